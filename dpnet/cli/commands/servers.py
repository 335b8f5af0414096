"""Commands for Prefect's server: deploy, up."""

from __future__ import annotations

import json
import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from data_prep.core.storage.open import open_store
from dpnet.cli.commands.roots import Outcome, check_root, root_to_read, use_server_of_up

_NO_SERVER = "no Prefect server is configured or running for this root; on a new one this "


def deploy(args: Namespace) -> Outcome:
    """Create or update the deployments, schedules and alerts on the Prefect server."""
    from dpnet.pipeline.config import load_settings

    use_server_of_up(root_to_read(args))
    from flows.deploy import deploy as put
    from flows.deploy import has_server
    from flows.deployments import DeploySettings, scheduled
    from flows.schedules import dates_text

    file = Path(args.file).expanduser() if args.file else None
    settings = load_settings(DeploySettings, file, args.set)
    lines = put(settings, dry_run=args.dry_run)
    dates = scheduled(settings)
    against = "" if has_server() else _NO_SERVER
    if not lines:
        text = "nothing to do: everything is deployed and up to date"
    else:
        text = "\n".join([f"{against}would change:", *lines] if args.dry_run else lines)
    text += "".join(
        f"\nnext dates of {name}: {dates_text(next_ones)} ({settings.timezone})"
        for name, next_ones in dates.items()
    )
    shown = {name: [each.isoformat() for each in next_ones] for name, next_ones in dates.items()}
    return {
        "ok": True,
        "dry_run": args.dry_run,
        "server": has_server(),
        "changes": lines,
        "next_dates": shown,
    }, text


def up(args: Namespace) -> Outcome:
    """Start a local Prefect server, a worker and MLflow, and wait for Ctrl-C."""
    from flows.local_server.children import DATABASE, LocalSetup, check_secrets
    from flows.local_server.password import login_url, serve_login_url
    from flows.local_server.up import Running, home_of
    from flows.local_server.up import up as run_up

    if args.database:
        os.environ[DATABASE] = args.database  # the children read it: no list of processes shows it
    store = open_store(root_to_read(args))
    home = home_of(store)
    check_secrets(LocalSetup(store.label, home, os.environ))
    check_root(store)

    def shown(running: Running) -> dict[str, Any]:
        return {
            **running.to_json(),
            "login_url": login_url(running.ui_url, home, os.environ),
            "serve_login_url": serve_login_url(running.serve_url, home, os.environ),
        }

    def announce(running: Running) -> None:
        found = shown(running)
        text = f"{_addresses(found, home)}\n\nCtrl-C stops everything."
        print(
            json.dumps({"ok": True, "attached": False, **found}) if args.json else text, flush=True
        )

    running = run_up(store, args.port, args.ray, announce, serve=args.serve)
    found = shown(running)
    text = f"{_addresses(found, home)}\n\nIt is already running: process {running.pid}."
    return {"ok": True, "attached": True, **found}, text


def _addresses(running: dict[str, Any], home: Path) -> str:
    """Return the addresses, and how to log in.

    Args:
        running: The values that `--json` prints.
        home: The folder of `dpnet up`.
    """
    from data_prep.core.password_file import USER, password_file
    from flows.local_server.password import PASSWORD

    rows = {"Prefect": "login_url", "try it": "serve_login_url", "MLflow": "mlflow_url"}
    rows |= {"Ray": "ray_url", "  token": "ray_token"}
    rows |= {"metrics": "metrics_url", "root": "root"}
    lines = [f"{name:<9}{running[key]}" for name, key in rows.items() if running[key]]
    export = [f"export PREFECT_API_URL={running['api_url']}"]
    if running["login_url"] == running["ui_url"]:
        log_in = f"Log in with the user and the password of {PASSWORD}."
    else:
        file = shlex.quote(str(password_file(home)))
        log_in = (
            f"{_logs_in(running)}: do not give it to others. MLflow and the"
            f"\nmetrics ask for the user {USER} and the password in {file}"
        )
        export.append(f'export {PASSWORD}="{USER}:$(cat {file})"')
    return "\n".join([*lines, "", log_in, "", "In other shells:", *(f"  {e}" for e in export)])


def _logs_in(running: dict[str, Any]) -> str:
    if running["serve_login_url"]:
        return "The addresses of Prefect and `try it` log your browser in"
    return "Prefect's address logs your browser in"
