"""The command line.  Commands import what they need when they run, so `fnreg --help` is quick."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from fnreg.commands import cohort as cohort
from fnreg.commands import figures as figures
from fnreg.commands import options
from fnreg.commands import quality as quality
from fnreg.commands import report as report
from fnreg.commands import transforms as transforms
from fnreg.commands.base import (
    ENVIRONMENT,
    FAILED,
    INTERRUPTED,
    OK,
    REFUSED,
    USAGE,
    app,
    print_table,
)
from fnreg.commands.base import Json as _Json
from fnreg.commands.base import Verbose as _Verbose
from fnreg.commands.base import option as _option
from fnreg.process import prepare
from fnreg.settings import SAVES, SPACES
from fnreg.specs import SettingsError, choose

DEMOS = ("story", "circle-to-c")

_Output = Annotated[Path, _option("Folder for the results; it must not hold anything yet.", "--output", "-o")]


@app.command
def register(
    fixed: Path,
    moving: Path,
    /,
    *,
    output: _Output,
    how: options.How = options.How(),
    fixed_mask: Annotated[Path | None, _option("Image; voxels of the fixed image count where it is above 0.")] = None,
    moving_mask: Annotated[Path | None, _option("The same for the moving image.")] = None,
    fixed_labels: Annotated[
        Path | None,
        _option("Image of whole numbers; the overlap before and after is told, --moving-labels are warped."),
    ] = None,
    moving_labels: Annotated[Path | None, _option("The same for the moving image.")] = None,
    fixed_points: Annotated[
        Path | None, _option("Landmarks, .csv, .fcsv or .mrk.json; their distance before and after is told.")
    ] = None,
    moving_points: Annotated[Path | None, _option("The same for the moving image, by name or row.")] = None,
    space: options.Space = None,
    save: Annotated[
        str | None, _option(f"What to write, joined by +, of: {', '.join(SAVES)}. [default: params+xfm+warped+figures]")
    ] = None,
    overwrite: Annotated[bool, _option("Replace results in a folder that holds some.")] = False,
    dry_run: Annotated[bool, _option("Check everything, say what would be done, write nothing.")] = False,
    as_json: Annotated[bool, _option("Print the record as JSON instead of text.", "--json")] = False,
    verbose: _Verbose = False,
) -> int:
    """Register a pair of images.

    Parameters
    ----------
    fixed
        Image whose grid the result has: NIfTI, MetaImage, NRRD, a folder of DICOM, PNG, JPEG or TIFF.
    moving
        Image that is to look like it.
    """
    chosen = how.chosen(save)
    if space is not None:
        choose("space", space, SPACES)
    from fnreg import results, run
    from fnreg.agreement import Paths
    from fnreg.loading import Files
    from fnreg.output import OutputFolder
    from fnreg.progress import Bars

    known = Paths((fixed_labels, moving_labels), (fixed_points, moving_points), space)
    files = Files(fixed, moving, output, fixed_mask, moving_mask, known)
    folder = OutputFolder(output, overwrite=overwrite, known=results.KNOWN)
    folder.check()
    with how.pointing(save):
        plan = run.prepare(files, chosen)
    if dry_run:
        _print_plan(plan.record(), as_json)
        return OK
    with folder, Bars() as bars:
        record = run.execute(plan, folder, bars.add(chosen.transform))
    for note in record["warnings"]:
        print(f"fnreg: warning: {note}", file=sys.stderr)
    print(json.dumps(record, indent=2) if as_json else _summary(record, verbose))
    return OK


def _print_plan(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    print(f"would register {record['inputs']['moving']['path']} to {record['inputs']['fixed']['path']}")
    for name, value in record["settings"].items():
        print(f"  {name:<12} {value}")
    print(f"  {'output':<12} {record['output']}; nothing was written")


def _summary(record: dict[str, Any], verbose: bool) -> str:
    lines = [f"{record['settings']['transform']}: {record['status']} after {record['seconds']:.1f} s, "
             f"{sum(record['steps'])} steps on {len(record['steps'])} levels"]  # fmt: skip
    for name, value in record["terms_after"].items():
        before = record["terms_before"].get(name)
        told = "" if before is None else f"{before:.6g} before, "
        lines.append(f"  {name:<12} {told}{'not finite' if value is None else f'{value:.6g} after'}")
    if "start" in record:
        lines.append(
            f"  {'start':<12} {record['start']}, chosen by trying; --start header takes the images as they lie"
        )
    if "rotation_degrees" in record:
        lines.append(f"  {'rotation':<12} {record['rotation_degrees']:.3f} degrees")
    told = ", ".join(f"{value:.3f}" for value in record["translation_of_center"])
    lines.append(f"  {'shift':<12} ({told}) at the middle of the fixed image")
    lines += _agreement(record)
    if "folds" in record:
        lines += _regularity(record)
    lines.append(f"  {'written':<12} {record['output']}: {', '.join(record['written'])}")
    if verbose:
        lines.append(f"  {'memory':<12} {record['peak_mb']:.0f} MB at most")
        lines += [
            f"  {'matrix' if not row else '':<12} {values}" for row, values in enumerate(record.get("matrix", ()))
        ]
    return "\n".join(lines)


def _agreement(record: dict[str, Any]) -> list[str]:
    """Overlap of labels and distance of landmarks, a line of each where they are known."""
    stages = record.get("metrics", {})
    lines: list[str] = []
    for key, name in (("dice_mean", "Dice"), ("tre_mean", "landmarks")):
        if key in stages.get("after", {}):
            before, after = (_rounded(stages[stage][key]) for stage in ("before", "after"))
            lines.append(f"  {name:<12} {before} before, {after} after, on average")
    return lines


def _rounded(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _regularity(record: dict[str, Any]) -> list[str]:
    """How regular a map with a field is."""
    told = {name: "unknown" if value is None else f"{value:.3g}" for name, value in record.items() if _plain(value)}
    folds = "no folds" if record["folds"] == 0 else f"folds at {100 * (record['folds'] or 0):.3g} % of the pixels"
    lines = [f"  {'determinant':<12} {told['jac_min']} to {told['jac_max']}, {folds}"]
    lines.append(f"  {'displacement':<12} {told['max_displacement']} at most")
    if "inverse_max" in record:
        lines.append(f"  {'inverse':<12} ends {told['inverse_max']} at most from where one began")
    return lines


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, float)


@app.command
def info(file: Path, /, *, as_json: _Json = False, verbose: _Verbose = False) -> int:
    """Tell what an image, a transform or a displacement file holds.

    Parameters
    ----------
    file
        Image (NIfTI, MetaImage, NRRD, a folder of DICOM, PNG, JPEG, TIFF), transform (.safetensors; ITK's and ANTs'
        .tfm, .txt, .h5, .mat; elastix' TransformParameters.0.txt) or displacement (.nii, .nii.gz).
    """
    from fnreg.info import describe

    print_table(describe(file), as_json)
    return OK


@app.command
def doctor(*, as_json: _Json = False, verbose: _Verbose = False) -> int:
    """Tell versions, devices, whether the compiled kernels are in use, and which extras are present."""
    from fnreg.doctor import report

    print_table(report(), as_json)
    return OK


@app.command
def demo(
    name: str = DEMOS[0],
    /,
    *,
    output: Annotated[Path, _option("Folder for the figures. [default: fnreg-demo]", "--output", "-o")] = Path(
        "fnreg-demo"
    ),
    verbose: _Verbose = False,
) -> int:
    """Search, descend, and register one pair and a hundred; needs about a minute and the extra plot.

    Parameters
    ----------
    name
        story, or circle-to-c: a disc becomes a C, a large deformation with its inverse.
    """
    choose("demo", name, DEMOS)
    from fnreg.demo import run_circle_to_c, run_demo

    {"story": run_demo, "circle-to-c": run_circle_to_c}[name](output)
    return OK


# -- errors -------------------------------------------------------------------------------------------------------


CODES = {  # of errors whose modules may import torch: what was not imported was not raised
    ("fnreg.extras", "MissingExtraError"): ENVIRONMENT,
    ("fnreg.cohort.cluster", "ClusterError"): ENVIRONMENT,
    ("fnreg.loading", "DeviceError"): ENVIRONMENT,
    ("fnreg.levels", "RegistrationError"): FAILED,
}


def _code(error: BaseException) -> int | None:
    """The exit code of an error that is the user's to mend; None for one that is ours."""
    if isinstance(error, (cyclopts.CycloptsError, SettingsError)):
        return USAGE
    for (module, name), code in CODES.items():
        found = sys.modules.get(module)
        if found is not None and isinstance(error, getattr(found, name)):
            return code
    return REFUSED if isinstance(error, (OSError, ValueError)) else None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, as errors are told."""
    print(f"fnreg: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.  Errors are one line on standard error, lists of problems one
    line each, unless -v is given."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    prepare()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            done = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return done if isinstance(done, int) else OK
    except KeyboardInterrupt as stop:
        print(f"fnreg: interrupted, {stop if str(stop) else 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "-v" in tokens or "--verbose" in tokens:
            traceback.print_exc()
        code = _code(error)
        # A list of what is wrong is one line for each; all else is one.
        lines = str(error).splitlines() if getattr(error, "problems", ()) else [str(error)]
        told = "\n  ".join(" ".join(line.split()) for line in lines) or type(error).__name__
        if code is None:
            told = f"internal error, {type(error).__name__}: {told}; run it again with -v and report this"
        print(f"fnreg: error: {told}", file=sys.stderr)
        return FAILED if code is None else code
