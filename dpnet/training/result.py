"""Write the result of a finished training: the averaged generator's weights, the log, figures."""

from __future__ import annotations

from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord
from data_prep.core.stage import Work
from data_prep.shards.shards import write_file
from dpnet.tracking.run_log import encode_log, hours_worked, remove_parts
from dpnet.training.checkpoints import newest
from dpnet.training.job import TrainJob, is_finished


def collect(job: TrainJob, work: Work) -> tuple[list[FileRecord], dict[str, Any]]:
    """Write the weights and the log of the run's last checkpoint. Return the files and the summary.

    Raises PipelineError if training is not finished.
    """
    import torch

    from dpnet.model_store.weights import save_generator
    from dpnet.training.loop import initial_state

    loaded = newest(work.store, job.folder)
    if loaded is None or not is_finished(job, loaded.mark.step, loaded.mark.finished):
        raise PipelineError(
            f"training of {work.store.label}/{work.folder} ended before its last step: run the same"
            " command again."
        )
    state = initial_state(job, torch.device("cpu"))
    state.from_dict(loaded.state, f"{work.store.label}/{loaded.mark.folder}")
    step = state.step
    if job.settings.result == "best" and state.best is not None:
        state.ema.load_state_dict(state.best["ema"])
        step = state.best["step"]
    facts = {
        "step": step,
        "images": job.images.content_digest,
        "masks": job.masks.content_digest,
    }
    text = encode_log(loaded.log)
    files = [
        *save_generator(work.store, work.folder, state.ema, facts),
        write_file(work, "log.jsonl", text, content=False),
    ]
    remove_parts(work.store, work.folder)
    summary = _summary(job, loaded.log, step)
    if loaded.mark.finished:
        summary["finished"] = loaded.mark.finished
    return files, summary


def _summary(job: TrainJob, log: list[dict[str, Any]], result: int) -> dict[str, Any]:
    validations = [record for record in log if record["kind"] == "validation"]
    training = [record for record in log if record["kind"] == "train"]
    first = validations[0]
    (kept,) = [record for record in validations if record["step"] == result]
    seconds = sum(record["seconds"] for record in training)
    steps = training[-1]["step"]
    gpu_hours, cpu_hours = hours_worked(training)
    return {
        "steps": steps,
        "samples": steps * job.settings.batch_size,
        "result_step": result,
        "parameters": kept["parameters"],
        "hole_psnr": kept["hole_psnr"],
        "hole_psnr_at_start": first["hole_psnr"],
        "mean_fill_psnr": kept["mean_fill_psnr"],
        "images_per_second": round(sum(r["images"] for r in training) / max(seconds, 1e-9), 1),
        "data_wait_share": round(sum(r["data_seconds"] for r in training) / max(seconds, 1e-9), 4),
        "gpu_hours": round(gpu_hours, 6),
        "cpu_hours": round(cpu_hours, 6),
        "skipped_steps": training[-1]["skipped_steps"],
        "skipped_samples": training[-1]["skipped_samples"],
    }
