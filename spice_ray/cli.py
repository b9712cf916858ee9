"""The command line."""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spice_ray import intake, prediction, workflow
from spice_ray.console import ConsoleReporter, probe_table, reuse_table, scores_table, seconds_table, trials_table
from spice_ray.errors import DataError, SpiceError
from spice_ray.mirror import local, path_of, shown
from spice_ray.recipe import load_recipe, read_scale, recipe_names
from spice_ray.run_folder import read_finished
from spice_ray.sweep import load_sweep


class _Commands(TyperGroup):
    """Commands whose errors are one sentence; errors in their arguments are Typer's own."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SpiceError as error:
            if "--verbose" in sys.argv:
                traceback.print_exc()
            typer.echo(f"spice-ray: {shown(error)}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            typer.echo("spice-ray: interrupted; the same command again goes on from here", err=True)
            sys.stderr.flush()
            os._exit(130)  # threads that wait for Ray would keep the process alive


app = typer.Typer(
    cls=_Commands,
    help="Cluster unlabelled images with SPICE on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str,
    typer.Option(
        help="A folder, files, a list or a URL of images (see README), embeddings, shards, or the word digits."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        parser=path_of, metavar="PATH", help="Run folder, or its URL; the same command again goes on where it stopped."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings such as num_clusters=20, num_clusters=auto or heads.count=5.")
]
FolderLabels = Annotated[
    bool, typer.Option("--labels-from-folders", help="Score against the names of the images' folders.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and its workers say.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help=f"A YAML file, or one of {', '.join(recipe_names())}.")],
    data: Data,
    out: Out,
    overrides: Overrides = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--from",
            parser=path_of,
            metavar="RUN",
            help="Another run of these images, with other settings: what it has made and they do not change is shared.",
        ),
    ] = None,
    labels_from_folders: FolderLabels = False,
    verbose: Verbose = False,
) -> None:
    """Cluster images, or embeddings: all stages, from whatever is finished already."""
    settings = load_recipe(recipe, overrides or [])
    prepared = workflow.prepare(settings, data, out, labels_from_folders=labels_from_folders, base=base)
    workflow.run(prepared, ConsoleReporter(), verbose=verbose)
    _show_result(out)


@app.command()
def demo(out: Out = Path("runs/demo"), overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Cluster the bundled handwritten digits on this machine and show how well it went."""
    prepared = workflow.prepare(load_recipe("digits", overrides or []), "digits", out)
    workflow.run(prepared, ConsoleReporter(), verbose=verbose)
    _show_result(out)


@app.command()
def ingest(
    source: Annotated[str, typer.Argument(help="A folder, files, a list or a URL (see README), or the word digits.")],
    out: Annotated[Path, typer.Argument(parser=path_of, metavar="OUT", help="Folder for the image shards, or a URL.")],
    size: Annotated[
        int | None, typer.Option(help="Side of the images in the shards, pixels; not for embeddings.", min=8, max=1024)
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the rows.", min=0)] = 0,
    labels_from_folders: FolderLabels = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as scale.wait_seconds=600.")] = None,
    verbose: Verbose = False,
) -> None:
    """Decode images once into shards that any number of runs can share."""
    scale = read_scale(overrides or [], "is no setting of shards")
    found = intake.open_source(source, labels_from_folders)
    shards = intake.ingest(found, out, scale, image_size=size, seed=seed, reporter=ConsoleReporter(), verbose=verbose)
    unit = "embeddings" if found.kind == "embeddings" else "images"
    rejected = shards.manifest["num_rejects"]
    typer.echo(f"{shards.manifest['num_images']} {unit} in {shown(shards.path)}, {rejected} rejected")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(parser=path_of, metavar="RUN", help="A finished run folder, or its URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also k-NN and a linear classifier, which learn from the labels.")
    ] = False,
) -> None:
    """Score a run against the labels of its data, beside k-means."""
    from rich.console import Console

    from spice_ray.evaluate import evaluate as score

    result = score(run, probe=probe)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        probes = [probe_table(result["probe"])] if probe else []
        Console().print(scores_table(result), *probes, seconds_table(result["seconds"]))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(parser=path_of, metavar="RUN", help="A finished run folder, or that of a sweep, or a URL.")
    ],
) -> None:
    """Show the clusters of a run, without labels: their sizes and examples, as one page of HTML."""
    from spice_ray.report.run import write_run_report

    typer.echo(shown(write_run_report(run)))


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(parser=path_of, metavar="RUN", help="A finished run folder, or that of a sweep, or a URL.")
    ],
    out: Annotated[
        Path | None, typer.Option(parser=path_of, metavar="FILE", help="RUN/classifier.pt2 unless given.")
    ] = None,
) -> None:
    """Write the classifier of a run as one file, which torch alone can load."""
    read_finished(run)  # before torch is imported
    from spice_ray.export import export as write

    typer.echo(shown(write(run, out)))


@app.command()
def settings(
    name: Annotated[str | None, typer.Argument(help="A setting such as joint.confidence, or a section.")] = None,
) -> None:
    """Say what settings there are and what each means."""
    from spice_ray.settings_help import find_settings

    typer.echo("\n".join(map(str, find_settings(name))))


@app.command()
def predict(
    run: Annotated[
        Path, typer.Argument(parser=path_of, metavar="RUN", help="A finished run folder, or that of a sweep, or a URL.")
    ],
    data: Data,
    out: Annotated[
        Path,
        typer.Option(parser=path_of, metavar="PATH", help="Folder for the table; the same command again goes on."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as scale.gpus_per_worker=1.")] = None,
    verbose: Verbose = False,
) -> None:
    """Classify new images by a finished run, into its clusters."""
    table = prediction.predict(run, data, out, overrides or [], ConsoleReporter(), verbose=verbose)
    sizes = ", ".join(f"{cluster}: {count}" for cluster, count in enumerate(table.manifest["cluster_sizes"]))
    typer.echo(f"cluster sizes: {sizes}")
    typer.echo(f"assignments: {shown(out / 'assignments.parquet')}")


@app.command()
def tune(
    sweep: Annotated[str, typer.Argument(help="A sweep's YAML, such as tune_configs/thresholds.yaml.")],
    data: Data,
    out: Out,
    overrides: Overrides = None,
    labels_from_folders: FolderLabels = False,
    recipe: Annotated[str | None, typer.Option(help="Another recipe than the sweep's.")] = None,
    verbose: Verbose = False,
) -> None:
    """Try settings of any stage: what trials share is done once, and they are ranked without labels."""
    from rich.console import Console

    settings = load_sweep(sweep)
    base = load_recipe(recipe or settings.recipe, overrides or [])
    prepared = workflow.prepare(base, data, out, labels_from_folders=labels_from_folders, trials=settings)
    name = Path(sweep).stem
    result = workflow.sweep(prepared, settings, name, ConsoleReporter(), verbose=verbose)
    keys, best = list(settings.space), result.rows[0]["values"]
    Console().print(trials_table(result.rows, keys, settings.objective), reuse_table(result.reuse))
    winner = ", ".join(f"{key}={value}" for key, value in best.items())
    folder = shown(out / "sweeps" / name)
    typer.echo(f"winner: {winner}; its recipe and assignments are in {folder}, and report.html beside them")


def _show_result(out: Path) -> None:
    """Cluster sizes, and scores where the data had labels."""
    import pyarrow.parquet as pq
    from rich.console import Console

    from spice_ray.evaluate import evaluate as score
    from spice_ray.storage import read_json

    # Paths and sentences are printed as they are: what looks like markup in them is not.
    console = Console(markup=False, highlight=False)
    clusters = pq.read_table(local(out / "assignments.parquet"), columns=["cluster"])["cluster"].to_pylist()
    record, counts = read_json(out / "run.json"), Counter(clusters)
    sizes = ", ".join(f"{cluster}: {counts[cluster]}" for cluster in range(record["recipe"]["num_clusters"]))
    console.print(f"cluster sizes of {len(clusters)} images: {sizes}", soft_wrap=True)
    if record["artifacts"]["labels"] is not None:
        try:
            console.print(scores_table(score(out)))
        except DataError as error:
            # The run is finished all the same: its labels are only of images that the protocol does not score.
            console.print(shown(error), soft_wrap=True)
    console.print(seconds_table(read_json(out / "timing.json")))
    console.print(f"assignments: {shown(out / 'assignments.parquet')}", soft_wrap=True)


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2."""
    app()
