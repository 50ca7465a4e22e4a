"""``celltyper encoders``: which there are, where their weights are, whether they work."""

from __future__ import annotations

from pathlib import Path

import click

from celltyper.commands.shared import PATH, common, say, start_log
from celltyper.errors import CelltyperError, DataError, RunError


@click.group(invoke_without_command=True)
@click.pass_context
def encoders(context: click.Context) -> None:
    """List the encoders that are known by name; show, fetch or check one.

    In the list, size is in parameters and mpp in micrometres per pixel; "have" says where the
    weights are: in the folder that CELLTYPER_WEIGHTS names, or in the cache of the hub.
    """
    if context.invoked_subcommand is None:
        from celltyper.encoders import list_cards, load_card
        from celltyper.encoders.listing import table

        click.echo(table(map(load_card, list_cards())))


@encoders.command()
@click.argument("name")
def show(name: str) -> None:
    """Show what is known of encoder NAME.

    A name of the list, timm/NAME, or owner/name on the hub.
    """
    from celltyper.encoders import find_card
    from celltyper.encoders.listing import description

    click.echo(description(find_card(name)))


@encoders.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--to", type=PATH, help="Folder to fill.  [default: the cache of the hub]")
@click.option("--revision", help="Commit or branch.  [default: as the card pins]")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def fetch(names: tuple[str, ...], to: Path | None, revision: str | None, quiet: bool) -> None:
    """Download weights, to work without network later.

    \b
    celltyper encoders fetch uni virchow2 --to weights
    celltyper train dpt -o run --set encoder.name=uni --weights weights
    """  # noqa: D301
    start_log(quiet)
    from celltyper.encoders import find_card
    from celltyper.encoders.hub import fetch_weights

    cards = [find_card(name) for name in dict.fromkeys(names)]
    if revision:
        cards = [card.model_copy(update={"revision": revision}) for card in cards]
    failed = []
    for card in cards:
        try:
            got = fetch_weights(card, to)
        except CelltyperError as error:
            click.echo(f"celltyper: {error}", err=True)
            failed.append(card.name)
            continue
        state = "fetched" if got.new else "there already"
        commit = f"commit {got.commit or 'unknown'}"
        facts = (state, f"{got.size / 1e6:,.1f} MB", commit, card.licence, str(got.path))
        say(quiet, f"{card.name}: {', '.join(facts)}")
    if failed:
        raise RunError(f"{len(failed)} of {len(cards)} not fetched: {', '.join(failed)}")


@encoders.command()
@click.argument("name")
@click.option("--weights", metavar="PATH", help="File or folder.  [default: what is here]")
@click.option("--image", type=PATH, help="H&E image.  [default: a field of the demo]")
@common
def check(name: str, weights: str | None, image: Path | None, device: str, quiet: bool) -> None:
    """Try encoder NAME on a real image.

    Says what was loaded and what its embeddings look like. Weights that are not here are not
    downloaded. Exit code 1 if the embeddings are broken.
    """
    start_log(quiet)
    from celltyper.datasets import read_image
    from celltyper.devices import pick_device
    from celltyper.encoders import find_card, load_encoder
    from celltyper.encoders.examine import examination_text, examine
    from celltyper.encoders.hub import MADE_NAMES, find_weights, weights_here
    from celltyper.readers.hgsc import fetch_hgsc

    card, place = find_card(name), pick_device(device)
    source: str | Path = weights or weights_here(card)
    if source not in MADE_NAMES:
        source = find_weights(card, source)
    if image is None:
        try:
            image = fetch_hgsc() / "hgsc_nest.jpg"
        except DataError as error:
            raise DataError(f"{error}; or pass --image FILE") from error
    pixels = read_image(image).image
    found = examine(load_encoder(name, weights=source).to(place), pixels)
    say(quiet, examination_text(card, source, image, found))
