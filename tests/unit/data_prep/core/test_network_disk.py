"""Databases are not on network disks, where SQLite loses data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.core import network_disk as disks
from data_prep.core.errors import ConfigError
from data_prep.core.network_disk import local_top, network_disk, refuse_network_disk
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.cli import main as cli
from dpnet.pipeline.chain import run_chain
from dpnet.pipeline.config import load_config
from dpnet.pipeline.demo import claim_root, clear_root
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import tracking_uri
from dpnet.tracking.mlflow_database import mlflow_database
from flows.local_server.children import DATABASE
from flows.local_server.up import home_of
from flows.run_from_command import run_pipeline

Mount = Callable[[str, str], Path]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """Return a function that makes folders look like mounts of a file system."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME", DATABASE):
        monkeypatch.delenv(name, raising=False)
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/vda / ext4 rw 0 0\nproc /proc proc rw 0 0\n")
    monkeypatch.setattr(disks, "MOUNTS", mounts)

    def add(name: str, kind: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        with mounts.open("a") as file:
            file.write(f"server:/x {str(folder).replace(' ', chr(92) + '040')} {kind} rw 0 0\n")
        return folder

    return add


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("nfs", True), ("nfs4", True), ("cifs", True), ("smb3", True), ("fuse.sshfs", True),
        ("fuse.s3fs", True), ("lustre", True), ("ceph", True), ("ext4", False), ("xfs", False),
        ("overlay", False), ("tmpfs", False), ("fuseblk", False), ("fuse.fuse-overlayfs", False),
    ],
)  # fmt: skip
def test_a_disk_is_known_by_the_type_of_its_file_system(
    mount: Mount, kind: str, network: bool
) -> None:
    folder = mount("a disk", kind)
    assert network_disk(folder / "new" / "file") == (kind if network else "")
    assert network_disk(folder.with_name("a disk of mine")) == ""


def test_the_deepest_and_last_mount_and_the_target_of_a_link_count(mount: Mount) -> None:
    far = mount("far", "nfs4")
    near = mount("far/scratch", "xfs")
    assert (network_disk(far), network_disk(near / "x")) == ("nfs4", "")
    (near.parent.parent / "link").symlink_to(far)
    assert network_disk(near.parent.parent / "link" / "x") == "nfs4"
    (far / "loop").symlink_to("loop")
    assert network_disk(far / "loop" / "x") == "nfs4"
    mount("mounted", "nfs")
    again = near.parent.parent / "mounted"
    with disks.MOUNTS.open("a") as file:
        file.write(f"/dev/vdb {again} ext4 rw 0 0\n")
    assert network_disk(again) == ""


def test_without_a_list_of_mounts_no_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "MOUNTS", tmp_path / "none")
    assert network_disk(tmp_path) == ""


def test_the_databases_of_a_root_on_a_network_disk_are_in_the_cache_folder(
    mount: Mount, tmp_path: Path
) -> None:
    cache = tmp_path / "home" / ".cache" / "dpnet"
    stores = [LocalStore(mount(name, "nfs4")) for name in ("a", "b")]
    found = [tracking_uri(RegisterSettings(), store) for store in stores]
    assert len(set(found)) == 2
    assert all(uri.startswith(f"sqlite:///{cache}/mlflow-") for uri in found)
    homes = [home_of(store) for store in stores]
    assert len(set(homes)) == 2
    assert {home.parent for home in homes} == {cache}
    assert [local_top(store) for store in stores] == [None, None]
    near = LocalStore(tmp_path / "near")
    assert (mlflow_database(near), home_of(near)) == (near.folder / "mlflow.db", near.folder / "up")
    assert mlflow_database(open_store("s3://bucket/root")) is None


def test_the_place_is_reported_and_an_older_database_is_copied(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(mount("old root", "cifs"))
    store.write("mlflow.db", b"older versions")
    database = mlflow_database(store)
    assert database is not None
    assert database.read_bytes() == b"older versions"
    database.write_bytes(b"and newer ones")
    assert mlflow_database(store) == database
    assert database.read_bytes() == b"and newer ones"
    said = f"{store.folder} is on a network disk (cifs): MLflow's database is {database}"
    assert caplog.text.count(said) == 1


def test_a_fresh_demo_removes_the_database_elsewhere(mount: Mount) -> None:
    store = LocalStore(mount("demo", "nfs4"))
    claim_root(store)
    store.write("mlflow.db", b"old")
    database = mlflow_database(store)
    clear_root(store)
    assert database is not None
    assert not database.exists()


def test_a_home_on_a_network_disk_needs_another_cache_folder(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(mount("home", "nfs4") / "root")
    for use in (
        lambda: tracking_uri(RegisterSettings(), store),
        lambda: run_chain(load_config("demo"), store),  # before the first stage
        lambda: run_pipeline(None, "", disks.database_cache(), embedded=True, debug=False),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"network disk \(nfs4\).*Set XDG_CACHE_HOME"):
            use()
    assert not store.folder.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "near"))
    assert tracking_uri(RegisterSettings(), store).startswith(f"sqlite:///{tmp_path}/near/dpnet/")
    assert home_of(store).parent == tmp_path / "near" / "dpnet"


def test_up_refuses_a_database_on_a_network_disk_before_it_starts(
    mount: Mount, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = mount("home", "nfs4")
    assert cli.main(["up", "--root", str(far / "root")]) == 2
    assert "the folder of Prefect's database cannot be" in capsys.readouterr().err
    monkeypatch.setenv(DATABASE, "")  # so that the test undoes what the command sets
    words = ["--database", f"sqlite+aiosqlite:///{far}/x.db"]
    assert cli.main(["up", "--root", str(far / "root"), *words]) == 2
    err = capsys.readouterr().err
    assert f"Prefect's database cannot be {far}/x.db: this is on a network disk (nfs4)" in err
    assert "Give --database a PostgreSQL URL" in err


def test_an_address_of_a_database_on_a_network_disk_is_refused(mount: Mount) -> None:
    far = mount("far", "fuse.sshfs")
    uri = f"sqlite:///{far}/mlflow.db"
    with pytest.raises(ConfigError, match=r"MLflow's database cannot be /.*fuse.sshfs.*tracking_"):
        tracking_uri(RegisterSettings(tracking_uri=uri), LocalStore(far))
    for other in ("http://mlflow:5000", "postgresql+asyncpg://me@host/db", "databricks"):
        refuse_network_disk(other, "it")
