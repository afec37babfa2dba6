"""Put a finished run into the package as one of its trained networks: `python tools/ship.py RUN NAME`.

NAME is as timm calls the weights, such as se_preact_resnet20.cifar10. The run's images have to be at hand: what the
network does on the test images is written beside its weights, as the images themselves do not travel. No place of this
machine is kept.
"""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import timm

import cmpe_se.shipped as shipped
from cmpe_se.errors import UserError
from cmpe_se.inspecting.gathering import Gathered, gather
from cmpe_se.inspecting.tested import save_tested
from cmpe_se.training.metrics import collect_logits
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.files import write_json, write_text


def main() -> None:
    """Answer a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("name", help="architecture, a dot, and a tag")
    arguments = parser.parse_args()
    source = RunFolder.open(arguments.run)
    target = RunFolder(Path(shipped.__file__).parent / arguments.name)
    base, _, tag = arguments.name.partition(".")
    if source.path.resolve() == target.path.resolve() or not tag or not timm.is_model(base):
        raise UserError(f"{arguments.name} should be a network of timm, a dot and a tag, and no source of its own")
    ship(source, target)
    print(target.path)


def ship(source: RunFolder, target: RunFolder) -> None:
    """Write the run folder of the package.

    Raises:
        UserError: the accuracy is another one than after training.
    """
    result, config = source.read_result(), source.read_config()
    if config.data_dir is None or not re.fullmatch("[0-9a-f]{40}", str(result.get("commit"))):
        raise UserError(f"{source.path} should be trained on class folders, by a commit without changes")
    tested = test(source)
    if abs(tested.top1 - result["test_top1"]) > 0.02:
        raise UserError(
            f"{source.path} has {tested.top1:.2f} % on its test images, and had {result['test_top1']:.2f} %"
        )
    shutil.rmtree(target.path, ignore_errors=True)
    target.model.mkdir(parents=True)
    write_text(target.config, replace(config, data_dir=Path(str(config.data_dir)).name).to_yaml())
    shutil.copyfile(source.metrics, target.metrics)
    command = result["command"].replace(str(source.path.resolve().parent), "runs")
    command = command.replace(str(Path(str(config.data_dir)).parent) + "/", "")
    write_json(target.result, {**result, "run": f"runs/{source.path.name}", "command": command})
    save_tested(tested, target.tested)
    shutil.copyfile(source.model / shipped.WEIGHTS, target.model / shipped.WEIGHTS)
    words = json.loads((source.model / "config.json").read_text(encoding="utf-8"))
    commit = result["commit"]
    words["architecture"] = target.path.name.partition(".")[0]
    words["pretrained_cfg"]["description"] = (
        f"CIFAR-10, {config.epochs} epochs, seed {config.seed}: test accuracy {result['test_top1']:.2f} %"
    )
    words["trained"] = {
        "test_top1": result["test_top1"],
        "test_images": result["test_images"],
        "train_images": result["train_images"],
        "epochs": config.epochs,
        "seed": config.seed,
        "commit": commit,
        "recipe": "config.yaml",
    }
    write_json(target.model / "config.json", words)


def test(run: RunFolder) -> Gathered:
    """What a run's network does on its test images."""
    model, data = run.load_model(), load_run_data(run)
    batches = data.test_batches(batch_size=250)
    if any(hasattr(module, "view") for module in model.modules() if module is not model):
        return gather(model, batches, len(data.classes))
    return Gathered.of_logits(*collect_logits(model, batches))


if __name__ == "__main__":
    main()
