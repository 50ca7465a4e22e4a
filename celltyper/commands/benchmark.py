"""``celltyper benchmark``: a matrix of systems, datasets and protocols, and its leaderboard."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from celltyper.commands.shared import PATH, common, say, start_log


@click.command()
@click.argument("spec")
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the benchmark.")
@click.option("--plan", is_flag=True, help="Only say what there is to run, how long and how large.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of SPEC, such as seeds=[0], or section.key of every config.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that the datasets are in.  [default: here]",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Processes on this machine.",
)
@click.option("--cluster", metavar="ADDRESS", help="Scheduler of a running Dask cluster.")
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(0),
    help="Bootstrap resamples of the intervals.",
)
@common
def benchmark(
    spec: str,
    output: Path,
    plan: bool,
    overrides: tuple[str, ...],
    data: Path | None,
    workers: int,
    cluster: str | None,
    resamples: int,
    device: str,
    quiet: bool,
) -> None:
    """Run all systems of SPEC on all its datasets in all its protocols, and compare them.

    SPEC is a YAML file or the name of a benchmark that comes along (docs/benchmark.md). Every cell
    is an ordinary protocol folder. The same command goes on where it was stopped, runs what was
    added, and tries again what failed. Writes index.html, leaderboard.csv, differences.csv and
    leaderboard.tex.

    \b
    celltyper benchmark mini -o mini
    celltyper benchmark ami-br -o ami-br --data DATA --plan
    """  # noqa: D301
    if cluster is not None and workers > 1:
        raise click.UsageError("give --workers or --cluster")
    start_log(quiet)
    from celltyper.benchmark.spec import load_benchmark

    benchmark, file, rest = load_benchmark(spec, overrides)
    if plan:
        from celltyper.benchmark.planning import plan_benchmark, plan_text

        planned = plan_benchmark(
            benchmark, file, output, data=data, overrides=rest, device=device, progress=not quiet
        )
        click.echo(plan_text(planned, workers=workers))
        return
    from celltyper.benchmark.running import run_benchmark
    from celltyper.benchmark.writing import leaderboard_text, report_benchmark

    try:
        run_benchmark(
            benchmark,
            file,
            output,
            data=data,
            overrides=rest,
            device=device,
            workers=workers,
            cluster=cluster,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        words = ["celltyper", "benchmark", spec, "-o", str(output)]
        words += [word for override in overrides for word in ("--set", override)]
        words += ["--data", str(data)] if data else []
        raise KeyboardInterrupt(f"stopped; go on with: {shlex.join(words)}") from None
    found = report_benchmark(output, resamples=resamples)
    say(quiet, leaderboard_text(found))
    say(quiet, f"leaderboard: {output / 'index.html'}")
    if found.failed:
        from celltyper.errors import RunError

        raise RunError(
            f"{len(found.failed)} of {len(found.about['cells'])} cells failed, the first "
            f"{found.failed[0].path}: {found.failed[0].state.error}; the same command tries them "
            "again"
        )
