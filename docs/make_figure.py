"""The README's picture: what competition looks like inside a trained network.

    python docs/make_figure.py runs/RUN docs/competition.png

For two test images of a finished run with a folded view: the image, and from the block of each stage whose gates vary
most the folded picture and the gates.
"""

import argparse

import torch
from matplotlib.figure import Figure

from cmpe_se import CompetitiveSE
from cmpe_se.data import load_data
from cmpe_se.figures import BLUE, GREY, ORANGE
from cmpe_se.run_folder import RunFolder


def look_inside(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """Probabilities (N, classes), and for each stage the block whose gates vary most over channels and images.

    A block is its ``number`` in the stage from 1, ``picture`` (N, h, w) and ``gate`` (N, C).
    """
    stages, handles = [], []
    for stage in model.stages:
        stages.append([{"number": number} for number, _ in enumerate(stage.blocks, start=1)])
        for block, record in zip(stage.blocks, stages[-1], strict=True):
            attention: CompetitiveSE = block.attention
            keep_picture = lambda _, inputs, record=record: record.update(picture=inputs[0][:, 0])  # noqa: E731
            keep_gate = lambda _, __, output, record=record: record.update(gate=output.sigmoid())  # noqa: E731
            handles += [attention.map_conv.register_forward_pre_hook(keep_picture)]
            handles += [attention.fc2.register_forward_hook(keep_gate)]
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    for handle in handles:
        handle.remove()
    return probabilities, [max(stage, key=lambda record: record["gate"].std()) for stage in stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="finished run with a folded view")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--images", type=int, nargs=2, default=(0, 1), help="numbers of two test images")
    parser.add_argument("--data-name", help="of the data set, for the title (default: the run's)")
    options = parser.parse_args()

    run = RunFolder.open(options.run)
    config, result, model = run.read_config(), run.read_result(), run.load_model()
    data = load_data(config.data, config.data_dir, image_size=config.image_size)
    batches = torch.cat([images for images, _ in data.test_batches(batch_size=256)])
    probabilities, seen = look_inside(model, batches[list(options.images)])

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    rows = figure.subfigures(2, 1)
    for row, (part, index) in enumerate(zip(rows, options.images, strict=True)):
        axes = part.subplots(1, 1 + 2 * len(seen), width_ratios=[1.25] + [1.1, 1.35] * len(seen))
        grey = {"cmap": "gray"} if data.in_chans == 1 else {}
        axes[0].imshow(data.test_image(index), **grey)
        best = probabilities[row].argmax().item()
        axes[0].set_title(f"{data.classes[best]} ({100 * probabilities[row, best]:.0f} %)", fontsize=10)
        axes[0].axis("off")
        for number, record in enumerate(seen):
            picture, gate = record["picture"][row], record["gate"][row]
            left, right = axes[1 + 2 * number], axes[2 + 2 * number]
            limit = picture.abs().max().item()
            left.imshow(picture, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
            left.set_yticks(range(len(picture)), ["r" if y % 2 == 0 else "i" for y in range(len(picture))], fontsize=7)
            for label in left.get_yticklabels():
                label.set_color(BLUE if label.get_text() == "r" else ORANGE)
            left.set_xticks([])
            right.axhline(0.5, color=GREY, linewidth=0.6, linestyle=":")
            right.plot(gate, color=BLUE, linewidth=1)
            right.set(ylim=(0, 1), xlim=(0, len(gate) - 1))
            right.tick_params(labelsize=7)
            right.spines[["top", "right"]].set_visible(False)
            if row == 0:
                left.set_title(f"stage {number + 1}, block {record['number']}", fontsize=10)
                right.set_title("gates", fontsize=10)
            else:
                right.set_xlabel("channel", fontsize=8)
    name = options.data_name or result["data"]
    figure.suptitle(
        f"{result['model']} on {name}: {result['test_top1']:.2f} % top-1.  Rows of a picture: r residual, i identity "
        "squeezes (purple above 0, orange below)",
        fontsize=11,
    )
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
