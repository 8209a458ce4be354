"""Trains the embedded model on pictures that it draws.

    python -m tetriserve.models.embedded.train vae
    python -m tetriserve.models.embedded.train transformer [--light]
    python -m tetriserve.models.embedded.train export [--light]

In that order; `export` writes the folder that is shipped, at any time of the training. A run that was cut goes
on from its last checkpoint when the same command is given again.

    python -m tetriserve.models.embedded.train restore [--light]
    python -m tetriserve.models.embedded.train transformer --refine [--light]

`restore` makes checkpoints of the shipped weights, in a folder that has none; `--refine` trains them further, on
pictures of 128 px and above and at a third of the rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from tetriserve.cache import cache_folder
from tetriserve.models.embedded import embedded_folder
from tetriserve.models.embedded.autoencoder import Reconstruction, fit_scale
from tetriserve.models.embedded.build import (
    VAE_CHANNELS,
    assemble,
    make_text_stack,
    make_transformer,
    make_vae,
    start_easy,
)
from tetriserve.models.embedded.flow import PICTURES, REFINING, STAGES, FlowMatching, Pool
from tetriserve.models.embedded.trainer import Trainer, begin

FULL: dict[str, Any] = {"heads": 8, "head_dim": 16, "double_blocks": 2, "single_blocks": 4}
LIGHT: dict[str, Any] = {"heads": 4, "head_dim": 16, "double_blocks": 1, "single_blocks": 3}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("vae", "pictures", "transformer", "export", "restore"))
    parser.add_argument("--light", action="store_true", help="the variant with a quarter of the compute")
    parser.add_argument("--refine", action="store_true", help="train what `restore` brought back")
    parser.add_argument("--steps", type=int, help="of the whole training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=cache_folder("training"), help="checkpoints and latents"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.part == "vae":
        train_vae(folder, options.steps or 5000, options.device)
    elif options.part == "pictures":
        for (height, width), count in PICTURES.items():
            Pool(folder, load_vae(folder), make_text_stack(width=64), height, width, count)
    elif options.part == "transformer":
        steps = options.steps or 24000
        transformer_trainer(folder, options.light, steps, options.device, options.refine).run()
    elif options.part == "restore":
        restore(folder, options.light)
    else:
        export(folder, options.light)


def train_vae(folder: Path, steps: int, device: str) -> None:
    torch.manual_seed(0)
    vae = make_vae(VAE_CHANNELS).to(device, memory_format=torch.channels_last)
    trainer = Trainer(vae, Reconstruction(vae).loss, folder / "vae.pt", steps=steps, learning_rate=1.5e-3)
    trainer.run()


def load_vae(folder: Path) -> Any:
    """The trained VAE, its latents scaled."""
    vae = make_vae(VAE_CHANNELS)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["average"])
    fit_scale(vae)
    return vae


def transformer_trainer(folder: Path, light: bool, steps: int, device: str, refine: bool) -> Trainer:
    text, model = _parts(light)
    model.to(device)
    stages = REFINING if refine else STAGES
    task = FlowMatching(model, load_vae(folder), text, folder, steps=steps, stages=stages)
    return Trainer(
        model,
        task.loss,
        _checkpoint(folder, light),
        steps=steps,
        learning_rate=7e-4 if refine else 2e-3,
        after_step=task.after_step,
    )


def restore(folder: Path, light: bool) -> None:
    """Begin from the shipped weights: checkpoints at step 0, for the VAE and for what is trained together.

    Raises `FileExistsError` where there is a checkpoint already.
    """
    _, model = _parts(light)
    shipped = FluxPipeline.from_pretrained(
        embedded_folder("embedded-light" if light else "embedded"), dtype=torch.float32
    )
    model["transformer"].load_state_dict(shipped.transformer.state_dict())
    model["t5"].load_state_dict(shipped.text_encoder_2.state_dict())
    model["clip"].load_state_dict(shipped.text_encoder.state_dict())
    begin(folder / "vae.pt", shipped.vae)
    begin(_checkpoint(folder, light), model)


def export(folder: Path, light: bool) -> None:
    """Write the model's folder from the moving average of the weights."""
    text, model = _parts(light)
    model.load_state_dict(torch.load(_checkpoint(folder, light), weights_only=True)["average"])
    pipeline = assemble(load_vae(folder), text, model["transformer"])
    for part in (pipeline.vae, pipeline.transformer):  # loaded as float32; the text encoders would stay half
        part.to(torch.float16)
    shipped = embedded_folder("embedded-light" if light else "embedded")
    pipeline.save_pretrained(shipped, safe_serialization=True)
    plot_losses({"VAE": folder / "vae.pt", "transformer": _checkpoint(folder, light)}, shipped)


def plot_losses(checkpoints: dict[str, Path], folder: Path) -> None:
    """`loss.png`, or `loss-refined.png` of what was trained after `restore`."""
    import matplotlib  # comes with the dev extra

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    states = {name: torch.load(path, weights_only=True) for name, path in checkpoints.items()}
    trained = {name: state for name, state in states.items() if state["losses"]}
    if not trained:
        return
    figure, panels = plt.subplots(1, len(trained), figsize=(9, 3), layout="constrained", squeeze=False)
    for panel, (name, state) in zip(panels[0], trained.items(), strict=True):
        steps, losses = zip(*state["losses"], strict=True)
        panel.plot(steps, losses, linewidth=0.8)
        panel.set(
            title=f"{name}, {state['seconds'] / 60:.0f} min", xlabel="step", ylabel="loss", yscale="log"
        )
    figure.savefig(folder / ("loss.png" if len(trained) == len(states) else "loss-refined.png"), dpi=110)
    plt.close(figure)


def _parts(light: bool) -> tuple[dict[str, Any], Any]:
    """The text encoders with their tokenizers, and what is trained together."""
    torch.manual_seed(0)
    text = make_text_stack(width=64)
    transformer = make_transformer(**(LIGHT if light else FULL))
    start_easy(transformer)
    return text, torch.nn.ModuleDict({"transformer": transformer, "t5": text["t5"], "clip": text["clip"]})


def _checkpoint(folder: Path, light: bool) -> Path:
    return folder / ("transformer-light.pt" if light else "transformer.pt")


if __name__ == "__main__":
    main()
