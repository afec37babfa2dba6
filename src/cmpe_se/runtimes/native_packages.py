"""AOTInductor packages: ``.pt2`` archives of PyTorch's compiler, which hold a shared library for one kind of machine.

Opening such a package runs its code, whoever wrote it; nothing in it can be checked before. A library that was compiled
for instructions that the processor lacks would end the process, and one that is given images of another shape or
layout would read memory that is not theirs without a word. So a package says what it was made for, and that is compared
before anything runs.
"""

import io
import json
import os
import platform
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cmpe_se.errors import UserError
from cmpe_se.layers.precision import cpu_flags
from cmpe_se.utils.records import check_shape, parse_json

_LIBRARIES = "data/aotinductor/"  # where the archive's compiled parts are
_METADATA, _MADE_FOR = "extra/cmpe_se", "extra/made_for"
# Sets of instructions that a compiler may use by itself where it is told to compile for the machine at hand.
_INSTRUCTIONS = re.compile(
    r"(avx|fma|bmi|f16c|movbe|abm|popcnt|s?sse|amx|gfni|sve|asimd|atomics|bf16|i8mm)\w*", re.ASCII
)


def is_native(content: bytes) -> bool:
    """Whether a file's content is an archive of compiled parts and no graph, by what it holds and not by its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        return False
    return any(name.startswith(_LIBRARIES) for name in names) and "models/model.json" not in names


def require_compiler() -> None:
    """Raise UserError where PyTorch's compiler finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        raise UserError(
            "export to aoti needs a C++ compiler, and none was found; install g++, or set CXX to your compiler"
        ) from None


def compile_package(program: ExportedProgram) -> dict[str, bytes]:
    """Compile a program of one input, (N, ...) with a free N, for this machine.

    Returns:
        The archive's parts by name, without the generated source and without paths of this machine.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # Else a library keeps the number of threads that PyTorch had where it was compiled.
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):  # PyTorch 2.14; they hold paths
        options["aot_inductor.enable_line_tables"] = False
    package = io.BytesIO()
    # The declaration says that a path is returned, but a file is taken as well.
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    with zipfile.ZipFile(package) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".cpp")}
    # Its messages name the files that they come from. In a library nothing may move, so the text keeps its length.
    for folder in (str(Path(torch.__file__).parents[1]), cache_dir()):
        blank = b"." * len(os.fsencode(folder))
        parts = {name: content.replace(os.fsencode(folder), blank) for name, content in parts.items()}
    size = program.example_inputs[0][0].shape[1:]
    return _with_parts(parts, {_MADE_FOR: json.dumps({**_this_machine(), "input_size": list(size)}).encode()})


def save_package(parts: dict[str, bytes], path: Path, metadata: str) -> None:
    """Write an archive's parts to a file, with our metadata among them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in _with_parts(parts, {_METADATA: metadata.encode()}).items():
            archive.writestr(name, content)


def load_package(content: bytes) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """Open a package, which runs its code: only one of an author that the user trusts.

    Args:
        content: of the file.

    Returns:
        The metadata, and a function of images, float32 (N, C, H, W), to logits (N, classes).

    Raises:
        ValueError: a package that was compiled for another kind of machine, or does not say for which.
        Exception: one that cannot be opened.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if _MADE_FOR not in names:
            raise ValueError("it does not say which machine it was compiled for")
        made_for = check_shape(parse_json(archive.read(names[_MADE_FOR]).decode()), dict[str, Any])
        metadata = archive.read(names[_METADATA]).decode() if _METADATA in names else None
    _check_machine(made_for)
    network = torch._inductor.aoti_load_package(io.BytesIO(content))
    size = tuple(made_for["input_size"])

    def run(images: Tensor) -> Tensor:
        _check_images(images, size)
        with torch.no_grad():
            return network(images.contiguous())  # the library takes any other layout for this one

    return metadata, run


def _with_parts(parts: dict[str, bytes], more: dict[str, bytes]) -> dict[str, bytes]:
    """Parts of an archive and others, in the one folder that PyTorch expects."""
    root = next(iter(parts)).partition("/")[0]
    return parts | {f"{root}/{name}": content for name, content in more.items()}


def _this_machine() -> dict[str, Any]:
    flags = cpu_flags() or set()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": sorted(flag for flag in flags if _INSTRUCTIONS.fullmatch(flag)),
    }


def _check_machine(made_for: dict[str, Any]) -> None:
    here = _this_machine()
    if made_for["system"] != here["system"]:
        raise ValueError(f"it was compiled for {made_for['system']}, and this machine is {here['system']}")
    if missing := sorted({*made_for["instructions"]} - {*here["instructions"]}):
        raise ValueError(f"it was compiled for a processor with {', '.join(missing[:5])}, which this one lacks")


def _check_images(images: Tensor, size: Sequence[int]) -> None:
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1:] != size or not len(images):
        expected = ", ".join(map(str, size))
        raise ValueError(f"images should be float32 (N, {expected}), got {images.dtype} {tuple(images.shape)}")
