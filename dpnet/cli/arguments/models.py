"""Options of the commands that use a model: inpaint, model, export."""

from __future__ import annotations

from dpnet.cli.arguments.options import Parsers, add_command, add_group, add_root, add_set


def add_inpaint(parsers: Parsers) -> None:
    """Add `dpnet inpaint`."""
    parser = add_command(
        parsers,
        "inpaint",
        "models.inpaint",
        "fill the holes of photos of any size",
        "dpnet inpaint photo.png mask.png -o filled.png --root ./dpnet-demo\n"
        "  dpnet inpaint photos/ masks/ -o filled/ --model models:/dpnet/2",
        "Pixels that are black in the mask do not change by a single bit. For several photos:"
        " photo.jpg takes the mask photo.png or else photo_mask.png (digits may follow), and the"
        " result is OUT/photo.png. Existing files are overwritten, but never a file that is read.",
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="a photo, a folder of photos, or a quoted glob such as 'photos/*.jpg'",
    )
    parser.add_argument(
        "mask",
        metavar="MASK",
        help="an image of the photo's size, white where to fill; or a folder or quoted glob",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        required=True,
        help="file to write; for several photos a folder",
    )
    add_root(parser, "where models are searched")
    parser.add_argument(
        "--model",
        default="",
        help="folder of a run or of an exported model, models:/NAME@champion or"
        " models:/NAME/VERSION (default: the root's champion)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of the squares into which a larger photo is cut (default: 512, at least 64);"
        " larger squares show the model more of the photo and need more memory",
    )


def add_model(parsers: Parsers) -> None:
    """Add `dpnet model describe`."""
    example = "dpnet model describe --preset base"
    group = add_group(parsers, "model", "describe the network", example)
    parser = add_command(
        group,
        "describe",
        "models.describe",
        "list a network's layers, shapes, multiply-adds (MACs) and parameters",
        f"{example} --set attention=single",
        "Only shapes are computed. No weights are read.",
    )
    parser.add_argument("--preset", default="base", help="tiny, base or large (default: base)")
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="side of the image, a multiple of 32 (default: 256)",
    )
    add_set(parser, "normalization=region", "`model`")


def add_export(parsers: Parsers) -> None:
    """Add `dpnet export`."""
    parser = add_command(
        parsers,
        "export",
        "models.export",
        "write a model that runs without this package",
        "dpnet export models:/dpnet@champion -o exported --format onnx --format torchscript",
        "The folder always contains model.safetensors, config.json and README.md, a model card"
        " that shows how to load each file. Every graph is loaded again and compared with the"
        " network before it is kept.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="",
        help="a model as for `dpnet inpaint --model` (default: the root's champion)",
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument(
        "--format",
        action="append",
        choices=["torch-export", "onnx", "torchscript"],
        help="format of the graph; may be repeated (default: torch-export)",
    )
    parser.add_argument(
        "--training-state",
        action="store_true",
        help="add the discriminator and the optimisers of the newest checkpoint, so that others can"
        " continue the training with train.init_from",
    )
    add_root(parser, "where models are searched")
