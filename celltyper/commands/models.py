"""``celltyper models``: which can be called by name, what they are, where to get more."""

from __future__ import annotations

import click

from celltyper.commands.shared import MODEL, say, start_log


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the models of the box and of your cache; show, fetch or remove one.

    Any of them is a model for infer, eval and export by its name. In the list, mpp is the
    resolution in micrometres per pixel that it works at.
    """
    if context.invoked_subcommand is None:
        from celltyper.library.listing import table
        from celltyper.library.shelf import list_models

        click.echo(table(list_models()))


@models.command()
@click.argument("name", type=MODEL)
def show(name: str) -> None:
    """Show what is known of model NAME, or of that of a run folder.

    Above all its card: what it was trained on, how good it is where it was not, and what it must
    not be used for.
    """
    from celltyper.library.listing import description
    from celltyper.library.shelf import find_model

    click.echo(description(find_model(name)))


@models.command()
@click.argument("source", metavar="URL_OR_HUB_ID")
@click.option("--name", help="What to call it.  [default: as it is published]")
@click.option("--sha256", metavar="HEX", help="Refuse a file with another SHA-256.")
@click.option("--revision", help="Commit or branch of the hub.  [default: main]")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def fetch(
    source: str, name: str | None, sha256: str | None, revision: str | None, quiet: bool
) -> None:
    """Download a published model into the cache.

    A folder or a .safetensors file on the web, or owner/name on the Hugging Face hub.

    \b
    celltyper models fetch https://example.org/nuclei.safetensors --sha256 HEX
    celltyper models fetch owner/nuclei
    celltyper infer image.png -m nuclei -o out
    """  # noqa: D301
    start_log(quiet)
    from celltyper.library.cards import read_card
    from celltyper.library.fetching import fetch_model

    got = fetch_model(source, name=name, sha256=sha256, revision=revision, progress=not quiet)
    card = read_card(got.folder)
    facts = (
        "fetched" if got.new else "there already",
        f"{got.size / 1e6:,.1f} MB",
        card.licence if card else "no card: licence not stated",
        f"SHA-256 {got.sha256}",
        str(got.folder),
    )
    say(quiet, f"{got.name}: {', '.join(facts)}")


@models.command()
@click.argument("name")
def remove(name: str) -> None:
    """Remove model NAME from the cache."""
    from celltyper.library.fetching import remove_model

    click.echo(f"removed: {remove_model(name)}")
