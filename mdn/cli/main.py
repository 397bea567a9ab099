"""The command `mdn`: a table of contents. Whatever needs TensorFlow imports it when it is run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mdn.cli.failure import FAILED, INTERRUPTED, fail
from mdn.errors import MDNError
from mdn.serving.limits import Limits

Probability = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)


def _limits(function: Callable) -> Callable:
    """Add an option for each limit of the service."""
    for field in reversed(dataclasses.fields(Limits)):
        function = click.option(
            f"--{field.name.replace('_', '-')}",
            type=click.IntRange(1),
            default=field.default,
            show_default=True,
            help=field.metadata["help"],
        )(function)
    return function


def _trust(function: Callable) -> Callable:
    """Add the option of what a run may name beside the classes of mdn and Keras."""
    return click.option(
        "--trust",
        multiple=True,
        metavar="MODULE.CLASS",
        help="A class of your own that the run names: its module is imported. Give several.",
    )(function)


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    try:
        code = command.main(standalone_mode=False, prog_name="mdn")
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        code = FAILED
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "mdn"
        fail(f"{error.format_message().rstrip('.')}: see {where} --help")
    except click.ClickException as error:
        fail(error.format_message())
    except MDNError as error:
        fail(error)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mdn", message="%(prog)s %(version)s")
def command() -> None:
    """Mixture density networks: from rows to p(y | x), and on to an artefact.

    \b
    Example:
      mdn train data=csv data.path=houses.csv data.targets=[price] k=5 output_dir=runs/houses
      mdn predict runs/houses new.csv -o prices.parquet
    """


@command.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(overrides: tuple[str, ...]) -> None:
    """Train, evaluate and export as the options say; --help lists them.

    \b
    Example:
      mdn train model=mixture k=3 output_dir=runs/first
    """
    from mdn.cli.train import main

    sys.argv = ["mdn train", *overrides]
    main()


@command.command()
@click.argument("run")
@click.argument("data")
@click.option("-o", "--output", required=True, help="The Parquet file to write.")
@click.option(
    "-q",
    "--quantile",
    "quantiles",
    type=Probability,
    multiple=True,
    help="A quantile of each target; give several. Default: 0.05, 0.5 and 0.95.",
)
@click.option("--keep", multiple=True, help="A column of DATA to copy, such as a key.")
@click.option("--overwrite", is_flag=True, help="Replace the output once the new one is whole.")
@_trust
def predict(run: str, data: str, output: str, **options: Any) -> None:
    """Answer for each row of DATA: a CSV or Parquet file, a folder of them, or a glob.

    Writes mean, standard deviation and quantiles of each target, and log_prob (nats) where a
    target is known. DATA may be of any size; a killed command, given again, goes on where it was.
    Runs of sequences, and others of arrays, take .npz files like those they were trained on.

    \b
    Example:
      mdn predict runs/first new.csv -o answers.parquet -q 0.1 -q 0.9 --keep id
    """
    from mdn.cli.progress import progress_bar
    from mdn.runs import check_answer

    check_answer(Path(output), options["overwrite"])
    _check(run, data)
    _import()
    from mdn.finished import predict_run

    options["quantiles"] = options["quantiles"] or None
    try:
        with progress_bar() as progress:
            prediction = predict_run(run, data, output, progress=progress, **options)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on where it was", INTERRUPTED)
    for line in prediction.lines(output):
        click.echo(line)


@command.command()
@click.argument("run")
@click.argument("data", required=False)
@click.option("-o", "--output", help="A JSON file for the metrics.")
@click.option("--overwrite", is_flag=True, help="Replace the output once the new one is whole.")
@_trust
def evaluate(
    run: str, data: str | None, output: str | None, overwrite: bool, trust: tuple[str, ...]
) -> None:
    """Judge a run on the rows of DATA, or on its own test rows.

    DATA is a CSV or Parquet file with targets (of a run of arrays an .npz file), a folder of them,
    or a glob.

    \b
    Example:
      mdn evaluate runs/first next_month.parquet -o metrics.json
    """
    from mdn.runs import check_output

    if output is not None:
        check_output(Path(output), overwrite)
    _check(run, data)
    _import()
    from mdn.evaluation import print_table
    from mdn.finished import evaluate_run

    print_table(evaluate_run(run, data, output, overwrite=overwrite, trust=trust))


@command.command()
@click.argument("run")
@click.argument("data", required=False)
@click.option("-o", "--output", help="The folder to draw into. Default: plots/ of the run.")
@_trust
def plot(run: str, data: str | None, output: str | None, trust: tuple[str, ...]) -> None:
    """Draw the pictures of a run: on the rows of DATA, or on its own test rows.

    \b
    Example:
      mdn plot runs/first next_month.parquet -o pictures
    """
    _check(run, data)
    _import()
    from mdn.finished import plot_run

    for path in plot_run(run, data, output, trust=trust):
        click.echo(path)


@command.command()
@click.argument("run")
@click.option(
    "--format",
    "form",
    type=click.Choice(["saved_model", "litert", "onnx"]),
    default="saved_model",
    show_default=True,
    help="What to write.",
)
@click.option("-o", "--output", help="Where to. Default: the format's name in the run.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@_trust
def export(
    run: str, form: str, output: str | None, overwrite: bool, trust: tuple[str, ...]
) -> None:
    """Write an artefact of a run that answers without mdn.

    A SavedModel answers everything. LiteRT and ONNX answer for the parameters of the density and
    for log_prob, a file each, of features that are numbers.

    \b
    Example:
      mdn export runs/first --format saved_model -o models/1
      mdn export runs/first --format litert
    """
    _check(run)
    _import()
    from mdn.finished import describe_artefact, export_run

    path = export_run(run, form, output, overwrite, trust=trust)
    for line in describe_artefact(path):
        click.echo(line)


@command.command()
@click.argument("run")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8501, show_default=True, help="0: any."
)
@click.option("--name", default="mdn", show_default=True, help="Of the model, in the paths.")
@_limits
def serve(run: str, host: str, port: int, name: str, **limits: int) -> None:
    """Answer over HTTP, as TensorFlow Serving does, and show the density on a page at /.

    RUN is a run, or a SavedModel that mdn export wrote. Needs the extra: pip install 'mdn[serve]'

    \b
    Example:
      mdn serve runs/first
      curl -d '{"instances": [[0.5]]}' http://127.0.0.1:8501/v1/models/mdn:predict
    """
    try:
        from mdn.serving.model import find_saved_model
        from mdn.serving.server import bind, check_name, serve
    except ModuleNotFoundError as error:
        if str(error.name).startswith("mdn"):
            raise
        fail(f"mdn serve needs {error.name}: pip install 'mdn[serve]'")
    from mdn.trust import read_description

    check_name(name)
    path = find_saved_model(run)
    read_description(path)
    with bind(host, port) as bound:
        _import(alone=True)
        serve(path, bound, name, Limits(**limits))


@command.command()
@click.argument("folder", default="runs")
@click.option("--sort", "key", help="The metric to sort by. Default: test/nll.")
def runs(folder: str, key: str | None) -> None:
    """List the runs below FOLDER (default: runs), the best first, by the rows they were tested on.

    \b
    Example:
      mdn runs runs --sort test/regret
    """
    from mdn.listing import find_runs, print_runs

    print_runs(find_runs(folder), key)


def _check(run: str, data: str | None = None) -> None:
    """Answer for a wrong path before TensorFlow is imported."""
    from mdn.runs import check_run

    check_run(run)
    if data is not None:
        from mdn.data.schema import find_rows

        find_rows(data)


def _import(alone: bool = False) -> None:
    from mdn.cli.quiet import import_tensorflow

    import_tensorflow(alone)
