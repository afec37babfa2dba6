"""The ``push`` command: a finished run's network to a folder or to the Hugging Face hub, in timm's format."""

import json
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from cmpe_se.errors import UserError
from cmpe_se.training.pretrained import HUB
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.summary import RunResult
from cmpe_se.utils.escaping import markdown, visible
from cmpe_se.utils.files import os_errors_as, refuse_other_encodings, sweep, whole_path, written_whole
from cmpe_se.utils.text import gate_words, in_one_line, pruned_word

_FILES, _README = ("config.json", "model.safetensors"), "README.md"

_CARD = """---
tags:
- image-classification
- timm
- cmpe-se
library_name: timm
pipeline_tag: image-classification
---
# {title}

{model}{view}, trained on {data} with cmpe-se, competitive squeeze-and-excitation
([arXiv 1807.08920](https://arxiv.org/abs/1807.08920)).

| | |
|---|---|
| top-1 | {test_top1:.2f} % |
| top-5 | {test_top5:.2f} % |
| test loss | {test_loss:.4f} |
| test images | {test_images:,} |
| parameters | {params:,} |
| multiply-adds | {macs:,} |
| epochs | {epochs} |
| seed | {seed} |
| commit | {commit} |
| versions | {versions} |

```python
import timm

import cmpe_se  # registers the network's name with timm

model = timm.create_model({address}, pretrained=True)
```
"""


def push(run: str, destination: str, *, private: bool = False) -> str:
    """Publish a finished run's network with a model card, in a folder or on the Hugging Face hub.

    The files are config.json, model.safetensors and README.md, the card with the run's metrics. The network loads with
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` or ``timm.create_model("hf-hub:NAME",
    pretrained=True)`` after ``import cmpe_se``.

    Args:
        run: run folder.
        destination: new or empty folder, or hf-hub:USER/NAME (after `hf auth login`).
        private: make the repository on the hub private, if it is new.

    Returns:
        The name to load it by.

    Raises:
        UserError: no finished run, a folder with something in it, a hub that cannot be reached.
    """
    folder = RunFolder.open(run)
    metrics = folder.read_result()
    if missing := [name for name in _FILES if not (folder.model / name).is_file()]:
        raise UserError(
            f"{folder.model} lacks {', '.join(missing)}; `cmpe-se train --resume {folder.path}` writes them"
        )
    folder.read_weights(), folder.preprocessing()  # damaged ones are not published
    if destination.startswith(HUB):
        address = destination
        with tempfile.TemporaryDirectory() as temporary:
            _write(folder, Path(temporary), metrics, address)
            _upload(Path(temporary), destination.removeprefix(HUB), private)
    else:
        refuse_other_encodings(destination)
        address = f"local-dir:{destination}"
        target = whole_path(destination)
        sweep(target)  # what a kill has left of an earlier push
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{destination} is not an empty folder; name a new one")
        _write(folder, target, metrics, address)
    print(visible(address))
    return address


def _write(run: RunFolder, target: Path, metrics: RunResult, address: str) -> None:
    config = run.read_config()
    words = gate_words(config.gate_settings)
    view = f" (view {metrics['view']}{words})" if metrics["view"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    names = {"model": markdown(metrics["model"] + pruned_word(config.widths)), "data": markdown(metrics["data"])}
    shown: dict[str, Any] = {**metrics, **names, "view": view, "versions": versions}
    title = f"{names['model']} on {names['data']}"
    card = _CARD.format(title=title, address=json.dumps(address, ensure_ascii=False), **shown)
    made = not target.exists()
    try:
        with os_errors_as(f"cannot write to {target}"), ExitStack() as together:  # all three files, or none
            target.mkdir(parents=True, exist_ok=True)
            drafts = {name: together.enter_context(written_whole(target / name)) for name in (*_FILES, _README)}
            for name in _FILES:
                shutil.copyfile(run.model / name, drafts[name])
            drafts[_README].write_text(card, encoding="utf-8")
    except BaseException:
        if made:
            with suppress(OSError):
                target.rmdir()
        raise


def _upload(folder: Path, repository: str, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="cmpe-se")
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Network and metrics of a run")
    except Exception as error:  # the hub's client raises many kinds, from names that cannot be to closed networks
        reason = in_one_line(error)
        raise UserError(
            f"cannot push to {repository} ({reason}); log in with `hf auth login`, or push to a folder"
        ) from None
