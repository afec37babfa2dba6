"""Evaluate, predict, report, explore and exported files make the same tensor of the same file, of whatever shape."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from cmpe_se.commands.evaluate import evaluate, load_tested
from cmpe_se.commands.explore.images import Picture
from cmpe_se.commands.explore.network import Network
from cmpe_se.commands.export import export
from cmpe_se.commands.export.formats import write
from cmpe_se.commands.predict import predict
from cmpe_se.commands.report.report import _test_photos
from cmpe_se.data import LargeImages, SmallImages, StreamedImages, read_image
from cmpe_se.data.preprocessing import KEY, Preprocessing
from cmpe_se.errors import UserError
from cmpe_se.exhibits.choosing import photo_of_file
from cmpe_se.inspecting.gathering import Gathered
from cmpe_se.runtimes.exported import load_exported
from cmpe_se.training import train
from cmpe_se.training.metrics import collect_logits
from cmpe_se.training.run_data import image_options, load_run_data
from cmpe_se.training.run_folder import RunFolder
from tests.photos import write_photos, write_shards
from tests.tiers import long_but
from tests.training.processes import empty_folder, trained_run
from tests.training.runs import checkpoint

pytestmark = pytest.mark.slow

KINDS = {"small": SmallImages, "large": LargeImages, "streamed": StreamedImages}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CMPE_SE_CACHE", str(tmp_path / "cache"))


@functools.cache
def photos() -> Path:
    return write_photos(empty_folder() / "photos")


@functools.cache
def trained(kind: str) -> RunFolder:
    """A run on the photos, after an epoch."""
    place = write_shards(empty_folder() / "shards", photos()) if kind == "streamed" else photos()
    data = "wds/photos" if kind == "streamed" else "folder"
    size = {"small": 32, "large": 100, "streamed": 64}[kind]
    settings = (f"--data={data}", f"--data-dir={place}", f"--image-size={size}", "--batch-size=8", "--workers=0")
    return RunFolder.open(trained_run(*settings, "--epochs=1"))


@pytest.fixture(params=KINDS)
def run(request) -> RunFolder:
    return trained(request.param)


@pytest.fixture
def older(tmp_path) -> RunFolder:
    """The run on small photos as it was saved before there was ``Preprocessing``, when such were resized by ``fit``."""
    folder = RunFolder(shutil.copytree(trained("small").path, tmp_path / "older"))
    config = json.loads((folder.model / "config.json").read_text())
    del config[KEY]
    own = load_run_data(RunFolder(folder.path))
    (folder.model / "config.json").write_text(json.dumps(config))
    tree = checkpoint(folder.path)
    del tree["preprocessing"]
    folder.checkpoints.save(tree)
    assert own.preprocessing.resize == "shorter_side"
    return folder


def files() -> list[Path]:
    """The test images in the order of evaluate."""
    return sorted((photos() / "test").rglob("*.*"))


def of_evaluate(folder: RunFolder) -> tuple[torch.Tensor, torch.Tensor]:
    """What evaluate gives the network, (N, C, H, W), and what that makes of it: probabilities (N, K)."""
    data, model = load_tested(folder, workers=0), folder.load_model()
    logits, _ = collect_logits(model, data.test_batches(batch_size=5))
    return torch.cat([images for images, _ in data.test_batches(batch_size=5)]), logits.softmax(1)


def of_predict(run: Path) -> torch.Tensor:
    """Probabilities (N, K) of the same files."""
    records = predict(str(run), [str(path) for path in files()], batch_size=7)
    rows = [{entry["class"]: entry["probability"] for entry in record["classes"]} for record in records]
    return torch.tensor([[row["china"], row["flower"]] for row in rows])


def test_evaluate_is_predict(run):
    assert type(load_tested(run, workers=0)) is KINDS[next(kind for kind in KINDS if trained(kind) is run)]
    _, expected = of_evaluate(run)
    found = of_predict(run.path)
    assert len(found) == 24
    assert found.std(0).min() > 1e-3  # or any tensors would do
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_every_command_makes_the_same_tensors(run):
    images, _ = of_evaluate(run)
    own, data = run.preprocessing(), load_run_data(run)
    tested = Gathered.of_logits(torch.zeros(data.test_size, 2), torch.zeros(data.test_size, dtype=torch.int64))
    network = Network(run)
    in_report = _test_photos(data, tested, range(data.test_size))
    for index, path in enumerate(files()):
        assert torch.equal(own.normalise(own.read(path)), images[index])
        assert torch.equal(photo_of_file(path, own).tensor, images[index])
        assert torch.equal(in_report[index].tensor, images[index])
        upload = Picture(functools.partial(read_image, path), "upload")
        assert torch.equal(network.photo(upload).tensor, images[index])
        assert np.array_equal((255 * network.photo(upload).pixels).round(), own.read(path).permute(1, 2, 0))
    # What explore looks at to choose its examples.
    assert torch.equal(next(network._batches(data, range(24)))[0], images)


@pytest.mark.long
@pytest.mark.parametrize("kind", long_but(KINDS, ["small"]))
def test_an_exported_file_is_the_run(kind, tmp_path):
    run = trained(kind)
    path = tmp_path / "model.onnx"
    assert export(str(run.path), output=str(path))["images"] == "test"
    assert load_exported(path).preprocessing == run.preprocessing()
    torch.testing.assert_close(of_predict(path), of_evaluate(run)[1], rtol=0, atol=2e-6)


def test_timm_makes_the_same_tensors_of_what_is_saved(run):
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    for path in files():
        expected = run.preprocessing()(read_image(path))
        torch.testing.assert_close(transform(read_image(path)), expected, rtol=0, atol=2e-6)


def test_the_run_has_the_data_s_preprocessing(run):
    saved = json.loads((run.model / "config.json").read_text())[KEY]
    assert Preprocessing.from_dict(saved, "there") == run.preprocessing() == load_run_data(run).preprocessing
    assert checkpoint(run.path)["preprocessing"] == saved


def test_an_older_run_of_small_photos(older):
    own = older.preprocessing()
    assert own.resize == "fit"
    images, expected = of_evaluate(older)
    torch.testing.assert_close(of_predict(older.path), expected, rtol=0, atol=1e-6)
    fitted = [ImageOps.fit(read_image(path), (32, 32), Image.Resampling.BICUBIC) for path in files()]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in fitted])
    assert torch.equal(images, own.normalise(pixels))
    assert not torch.equal(images, of_evaluate(trained("small"))[0])


def test_an_older_run_goes_on_as_it_was(older):
    config = older.read_config()
    assert image_options(config, older, config) == {"image_size": 32, "resize": "fit"}
    assert image_options(config.changed(image_size=40), older, config) == {"image_size": 40}
    train(resume=older.path, epochs=2)
    saved = older.preprocessing()
    assert saved.resize == checkpoint(older.path)["preprocessing"]["resize"] == "fit"
    assert image_options(config, older, config) == {"preprocessing": saved}
    assert load_run_data(older).preprocessing == saved


@pytest.mark.long
def test_older_runs_of_other_images():
    large = trained("large")
    config = large.model_config()
    assert Preprocessing.from_timm(config, "there") == large.preprocessing()
    digits = RunFolder(trained_run("--epochs=1"))
    assert digits.resize_before_preprocessing() == "shorter_side"
    assert Preprocessing.from_timm(digits.model_config(), "there") == digits.preprocessing()


@pytest.mark.long
def test_an_older_exported_file(tmp_path):
    run = trained("small")
    config = {key: value for key, value in run.model_config().items() if key != KEY}
    path = tmp_path / "model.onnx"
    write(run.load_model(), path, "onnx", input_size=config["input_size"], metadata=config)
    assert load_exported(path).preprocessing == run.preprocessing()
    write(run.load_model(), path, "onnx", input_size=config["input_size"], metadata=config | {KEY: {"crop": 1}})
    with pytest.raises(UserError, match=r"model.onnx: preprocessing lacks classes, size, mean, .*; use a file that"):
        load_exported(path)


def test_a_config_that_cannot_be_used(older):
    file = older.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {KEY: {}}))
    with pytest.raises(UserError, match=r"config\.json: preprocessing lacks classes"):
        predict(str(older.path), str(photos()))


def test_other_data_are_taken_as_the_run_s(tmp_path):
    """The run's mean and deviation, not those of the images that it is tested on."""
    run = trained("small")
    other = write_photos(tmp_path / "other", ("test", "train"))
    data = load_tested(run, data_dir=str(other), workers=0)
    assert data.preprocessing == run.preprocessing()
    assert data.statistics != (data.mean, data.std)
    assert evaluate(str(run.path), data_dir=str(other), workers=0)["images"] == 24
