"""The ``export`` command: a finished run's network to a file for another runtime, verified there."""

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

import cmpe_se
from cmpe_se import merging
from cmpe_se.commands.export.formats import PACKAGES, write
from cmpe_se.commands.export.images import first_test_images, random_images, training_batches
from cmpe_se.commands.export.quantisation import accuracy, gate_names, quantise
from cmpe_se.commands.export.verification import BATCH_SIZES, verify, verify_batch_sizes
from cmpe_se.data import ImageData
from cmpe_se.data.preprocessing import KEY
from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import SUFFIXES, format_by_name, load_exported
from cmpe_se.runtimes.native_packages import require_compiler
from cmpe_se.shipped import SHIPPED
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.files import os_errors_as, sweep, whole_path
from cmpe_se.utils.packages import require
from cmpe_se.utils.terminal import Terminal


def export(
    run: str = SHIPPED,
    *,
    to: str = "onnx",
    output: str | None = None,
    merge: bool = True,
    int8: bool = False,
    calibration_images: int = 512,
) -> dict[str, Any]:
    """Export a finished run's network to ONNX, torch.export, OpenVINO or AOTInductor, and verify it.

    The file takes batches of any size and contains class names and preprocessing: `cmpe-se predict` accepts it in place
    of the run. It is compared with PyTorch at batch sizes 1, 2, 3 and 7, on test images of the run's data set, or on
    random ones if that cannot be loaded.

    Args:
        run: run folder, or a network that comes with the package, by name; the one with folded gates if left out.
        to: format of the file: onnx, torch-export, openvino or aoti (compiled for this kind of machine alone, by a C++
            compiler, which takes a minute or more).
        output: file to write; RUN/export/model.onnx, .pt2, .xml (with .bin beside it) or .aoti.pt2 if left out.
        merge: merge the network first (`cmpe_se.merge`), for the same outputs from less work.
        int8: write a quantised int8 network too, as model.int8.onnx beside model.onnx, and test both (onnx only).
        calibration_images: number of training images that calibrate the ranges of int8.

    Returns:
        ``path``, ``format``, ``merged``, ``bytes``, ``batch_sizes`` (those that were compared), ``images`` ("test" or
        "random"), ``largest_error`` (of a logit, as a part of the largest). With ``int8`` also ``test_top1`` (percent)
        and ``int8``: ``path``, ``bytes`` and ``test_top1`` of that file.

    Raises:
        UserError: an unknown format, no finished run, a missing package or compiler, a network that cannot be exported
            or is another one afterwards, a file that cannot be written, or int8 without the run's data.
    """
    _check(to, output, int8, calibration_images)
    folder = RunFolder.open(run)
    network, preprocessing = folder.load_model(), folder.preprocessing()
    target = whole_path(output) if output else folder.outputs / "export" / f"model{SUFFIXES[to]}"
    console = Terminal(stderr=True)
    with console.status("loading test images"):
        data = _data(folder, needed=int8)
    count = sum(BATCH_SIZES)
    images = first_test_images(data, count) if data else random_images(preprocessing.size, count)
    exported = merging.merge(network) if merge else network
    result: dict[str, Any] = {"path": str(target), "format": to, "merged": merge, "batch_sizes": list(BATCH_SIZES)}
    result["images"] = "test" if data else "random"
    with os_errors_as(f"cannot write {target}", advice="make room, or name an --output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, ".export-*")
        # Beside the target: what is verified there is renamed, and anything else goes away with the folder.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as temporary:
            draft = Path(temporary) / target.name
            with console.status(f"exporting to {to}"):
                metadata = folder.model_config() | {
                    KEY: preprocessing.to_dict(),  # of a run from before there was one, too
                    "cmpe_se": cmpe_se.__version__,
                    "merged": merge,
                }
                write(exported, draft, to, input_size=preprocessing.size, metadata=metadata)
            with console.status("comparing with PyTorch"):
                result["largest_error"] = verify(load_exported(draft, trust_pickle=True), network, images)
            if int8 and data:
                result |= _int8(draft, exported, data, images, calibration_images, console)
                result["int8"]["path"] = str(target.with_suffix(".int8.onnx"))
            result["bytes"] = sum(_size(file) for file in (draft, draft.with_suffix(".bin")) if file.exists())
            # OpenVINO's weights come first: a model without them would be of no use.
            for file in sorted(Path(temporary).iterdir()):
                os.replace(file, target.with_name(file.name))
    _print(result)
    return result


def _check(to: str, output: str | None, int8: bool, calibration_images: int) -> None:
    if to not in SUFFIXES:
        raise UserError(f"there is no format {to!r}; there are {', '.join(SUFFIXES)}")
    if output and (not output.endswith(SUFFIXES[to]) or format_by_name(output) != to):
        raise UserError(f"output {output} should be named as files of {to} are, *{SUFFIXES[to]}")
    if int8 and to != "onnx":
        raise UserError(f"int8 is for onnx only, not for {to}; leave int8 out, or export to onnx")
    if calibration_images < 1:
        raise UserError(f"calibration_images is {calibration_images}, should be at least 1; some hundreds are good")
    require(PACKAGES[to], f"export to {to}", extra="export")
    if to == "aoti":
        require_compiler()


def _data(folder: RunFolder, *, needed: bool) -> ImageData | None:
    try:
        return load_run_data(folder)
    except UserError as error:
        if needed:
            raise UserError(f"int8 needs the run's images: {error}") from None
        return None


def _int8(
    source: Path, network: nn.Module, data: ImageData, images: Tensor, calibration_images: int, console: Console
) -> dict[str, Any]:
    """Write the int8 form beside a file; both files' accuracies, and the form's size in bytes."""
    target = source.with_suffix(".int8.onnx")
    with console.status("calibrating int8"):
        quantise(source, target, training_batches(data, calibration_images), gate_names(network))
    quantised = load_exported(target)
    verify_batch_sizes(quantised, images)
    before = accuracy(load_exported(source), data, "testing float32", console)
    after = accuracy(quantised, data, "testing int8", console)
    return {"test_top1": before, "int8": {"bytes": _size(target), "test_top1": after}}


def _size(file: Path) -> int:
    return file.stat().st_size


def _print(result: dict[str, Any]) -> None:
    form = "merged" if result["merged"] else "as trained"
    sizes = ", ".join(map(str, result["batch_sizes"]))
    print(f"{visible(result['path'])}: {result['format']}, {form}, {result['bytes']:,} bytes")
    print(
        f"compared with PyTorch on {result['images']} images, batches of {sizes}: "
        f"largest error {result['largest_error']:.1e} of the largest logit"
    )
    if "int8" in result:
        int8 = result["int8"]
        print(f"{visible(int8['path'])}: int8, {int8['bytes']:,} bytes")
        print(f"test top-1 {result['test_top1']:.2f} % in float32, {int8['test_top1']:.2f} % in int8")
