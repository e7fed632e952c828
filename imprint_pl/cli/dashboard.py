"""The command `dashboard`: options and output; `experiments/dashboard.py` does the work."""

from __future__ import annotations

import os

from imprint_pl.cli.arguments import PROGRAM, ArgumentParser
from imprint_pl.errors import ImprintError, needs
from imprint_pl.experiments.dashboard import log_sweep, workspace


def run(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: its arguments, without its name.
    """
    parser = ArgumentParser(
        prog=f"{PROGRAM} dashboard",
        description="Build the wandb workspace that compares recipes; log a sweep's results first.",
    )
    parser.add_argument(
        "results", nargs="?", help="results of a sweep, to log as a run each (default: log none)"
    )
    parser.add_argument("--project", default="imprint_pl", help="of wandb (default: imprint_pl)")
    parser.add_argument("--entity", help="the wandb user or team (default: the login's)")
    parser.add_argument(
        "--offline", action="store_true", help="write the runs to wandb/, to be sent later"
    )
    given = parser.parse_args(argv)
    offline = given.offline or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline:
        # Import before the login and the runs, so that a missing package is reported at once.
        with needs("sweep", "dashboard"):
            import wandb_workspaces  # noqa: F401
    entity = None if offline else given.entity or _login()
    if given.results:
        count = log_sweep(given.results, given.project, given.entity, offline)
        print(f"wandb: {count:,} runs in the project {given.project}")
    if entity is None:
        print(_what_to_do(given.project, given.entity, bool(given.results)))
        return
    try:
        saved = workspace(entity, given.project).save()
    except Exception as error:
        raise ImprintError(
            f"the workspace of {entity}/{given.project} could not be saved "
            f"({type(error).__name__}: {' '.join(str(error).split())}): look at the names, log a "
            "run into the project first, and try again"
        ) from error
    print(f"dashboard: {saved.url}")


def _login() -> str:
    """Returns the entity of the login.

    Raises:
        ImprintError: there is no login or no network. wandb would ask for a key instead.
    """
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise ValueError("no API key")
        entity = wandb.Api(timeout=20).default_entity
        if not entity:
            raise ValueError("the login has no default entity")
        return entity
    except Exception as error:
        raise ImprintError(
            f"wandb cannot be reached ({' '.join(str(error).split())[:200]}): run `wandb login` "
            "where there is a network, or give --offline for runs that `wandb sync` sends later"
        ) from error


def _what_to_do(project: str, entity: str | None, logged: bool) -> str:
    own = f" --entity {entity}" if entity else ""
    steps = ["wandb login", f"python -m imprint_pl dashboard --project {project}{own}"]
    if logged:
        steps.insert(1, f"wandb sync --include-offline wandb/offline-run-* -p {project}")
    what = "offline: the workspace lives on wandb's server. Where there is a network:"
    return "\n  ".join([what, *steps])
