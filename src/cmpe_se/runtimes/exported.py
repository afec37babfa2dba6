"""Exported files in use: each runs in its own runtime, behind one interface."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmpe_se.data.preprocessing import KEY, Preprocessing
from cmpe_se.errors import UserError
from cmpe_se.runtimes.archives import CodeInFileError, refuse_code
from cmpe_se.runtimes.native_packages import is_native, load_package
from cmpe_se.runtimes.programs import openvino_core
from cmpe_se.utils.packages import quiet, require
from cmpe_se.utils.records import check_shape, parse_json
from cmpe_se.utils.text import in_one_line

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "aoti": ".aoti.pt2"}
"""The formats, and what their files' names end in."""

METADATA = "cmpe_se"
"""The key under which each format keeps our JSON."""

_RUNTIMES = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}


class Exported:
    """A network of an exported file, on the CPU with as many threads as PyTorch has.

    Args:
        config: the file's metadata, under the keys of ``RunFolder.model_config``.
        preprocessing: what makes the network's images, and its classes.
        function: images to logits.
    """

    def __init__(self, config: dict[str, Any], preprocessing: Preprocessing, function: Callable[[Tensor], Tensor]):
        self.config, self.preprocessing, self._function = config, preprocessing, function

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images, float32 (N, C, H, W), to logits, float32 (N, classes)."""
        return self._function(images)


def is_exported(path: str | Path) -> bool:
    """Whether a path is named as the files of ``cmpe-se export`` are (and is no folder)."""
    return format_by_name(path) is not None and not Path(path).is_dir()


def format_by_name(path: str | Path) -> str | None:
    """Which of the formats a file's name says that it has; None for other names."""
    fitting = [to for to, suffix in SUFFIXES.items() if Path(path).name.lower().endswith(suffix)]
    return max(fitting, key=lambda to: len(SUFFIXES[to]), default=None)


def load_exported(path: str | Path, *, trust_pickle: bool = False) -> Exported:
    """Open a file of ``cmpe-se export``; its suffix says in which format it is, and for .pt2 its content.

    ONNX and OpenVINO files hold no code. A .pt2 file can, as pickles and in other ways; one that holds more than a
    graph of PyTorch's own operators is refused. A compiled package (aoti) is nothing but code, whoever wrote it.

    Args:
        path: of the file.
        trust_pickle: open any .pt2 file, and run what is inside it.

    Raises:
        UserError: no such file, one that its runtime cannot read, one that could run code, one without our metadata, a
            missing runtime, a package that was compiled for another kind of machine.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; `cmpe-se export RUN` writes one")
    to = format_by_name(path)
    if to is None:
        raise UserError(f"{path} is not named as exported files are: {', '.join(SUFFIXES.values())}")
    require(_RUNTIMES.get(to, ()), f"running {path.name}", extra="export")
    content = b""
    if to in ("torch-export", "aoti"):
        content = path.read_bytes()  # once: what was looked at is what is opened
        to = "aoti" if is_native(content) else "torch-export"
    if to == "aoti" and not trust_pickle:
        raise UserError(
            f"{path} is a compiled package (aoti): opening it runs its native code, which nothing can check; "
            "give --trust-pickle if you trust its author"
        )
    load = {
        "onnx": partial(_load_onnx, path),
        "openvino": partial(_load_openvino, path),
        "torch-export": partial(_load_torch_export, content, trust=trust_pickle),
        "aoti": partial(load_package, content),
    }[to]
    try:
        with quiet():
            metadata, function = load()
    except CodeInFileError as error:
        raise UserError(
            f"{path} holds {error}, and opening it could run any code; use a file that `cmpe-se export` wrote, or give "
            "--trust-pickle if you trust its author"
        ) from None
    except Exception as error:  # each runtime raises many kinds
        raise UserError(f"{path} cannot be read as {to} ({in_one_line(error)}); export the run again") from None
    config = _config(metadata)
    try:
        # Files from before there was ``Preprocessing`` say it in timm's words alone.
        known = Preprocessing.from_dict(config[KEY], str(path)) if KEY in config else None
        preprocessing = known or Preprocessing.from_timm(config, str(path))
    except UserError as error:
        raise UserError(f"{error}; use a file that `cmpe-se export` wrote") from None
    return Exported(config, preprocessing, function)


def _config(metadata: str | None) -> dict[str, Any]:
    try:
        return check_shape(parse_json(metadata or "{}"), dict[str, Any])
    except (ValueError, TypeError):
        return {}


def onnx_session(content: bytes) -> Any:
    """An ONNX model in ONNX Runtime, on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal errors only; all others are raised too
    # From memory: such a session has no folder, and reads no weights from other files, which a path could name.
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def openvino_network(model: Any) -> Any:
    """An OpenVINO model compiled in float32, on the CPU with as many threads as PyTorch has."""
    # By itself OpenVINO computes in bfloat16 on CPUs that can, and errs in the second digit.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino_core().compile_model(model, "CPU", settings)


def _load_onnx(path: Path) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    session = onnx_session(path.read_bytes())
    name = session.get_inputs()[0].name
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA)
    return metadata, lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _load_torch_export(content: bytes, *, trust: bool) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    if not trust:
        refuse_code(content)
    extra = {METADATA: ""}
    network = torch.export.load(io.BytesIO(content), extra_files=extra).module()
    return extra[METADATA], torch.no_grad()(network)


def _load_openvino(path: Path) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    model = openvino_core().read_model(path)
    metadata = model.get_rt_info([METADATA]).value if model.has_rt_info([METADATA]) else None
    network = openvino_network(model)
    return metadata, lambda images: torch.from_numpy(network(images.numpy())[0].copy())
