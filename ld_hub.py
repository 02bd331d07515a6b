"""A trained model on the Hugging Face Hub: the page that says how it was made, and the upload."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, get_token

from ld_checkpoint import NEWEST, load_checkpoint

CODE = "https://github.com/krystv/liquid-diffusion"
LICENCE_NOTE = (
    "The code is under the MIT licence. What the weights may be used for depends on the pictures they learned from"
)
SAMPLES_NOTE = "Noto emoji, Apache License 2.0 and SIL Open Font License 1.1"


class HubError(RuntimeError):
    """The Hub did not take a model; the message is one sentence that says what to do."""


def share(model, repo, run_dir, metrics=None, private=None, token=None):
    """Put a model, its page and its sample grid on the Hub as `repo`, "owner/name"; returns the address of the commit.

    model: anything with PyTorchModelHubMixin, best the averaged weights. run_dir: the run's folder, with checkpoint.pt and,
    if made, samples.png. metrics: name -> what was measured. token: by default the one in HF_TOKEN or of an earlier login;
    nothing asks for it and it is written nowhere. Raises HubError.
    """
    token = token or get_token()
    if not token:
        raise HubError(
            "There is no Hub token here; make one with write access at huggingface.co/settings/tokens and put it into HF_TOKEN "
            "(on Colab: the key symbol at the left)."
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, repo, run_dir, folder, metrics)
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model, page and samples"
            ).commit_url
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise HubError(
                f"The Hub did not take {repo} ({reason}); check the name and that the token may write there."
            ) from None


def write_model(model, repo, run_dir, folder, metrics=None):
    """Fill `folder` with what the Hub gets: config.json, model.safetensors, README.md and, if there is one, samples.png."""
    folder, grid = Path(folder), Path(run_dir) / "samples.png"
    if grid.exists():
        (folder / grid.name).write_bytes(grid.read_bytes())
    state = load_checkpoint(Path(run_dir) / NEWEST)
    (folder / "README.md").write_text(model_card(model, repo, state, metrics, grid.exists()), encoding="utf-8")
    model.save_pretrained(folder)  # keeps the README.md that is there


def model_card(model, repo, state, metrics=None, grid=False):
    """The page of a model on the Hub, Markdown with front matter. state: the run's checkpoint, of ld_checkpoint."""
    settings, run = state["settings"], state["run"]
    source, note, on_hub = describe_source(settings["source"])
    losses = run["losses"][-100:]
    front = ModelCardData(
        library_name="liquid-diffusion",
        pipeline_tag="unconditional-image-generation",
        tags=["liquid-diffusion", "rectified-flow", "cfc", "attention-free"],
        datasets=[settings["source"]] if on_hub else None,
    )
    size = settings["plan"] or f"{settings['image_size']} px"
    made = {
        "pictures": f"{source}, {size}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} (preset `{settings['preset']}`)",
        "network": f"`{model.config}`",
        "training": f"{state['counts']['steps']:,} steps of {settings['batch_size']} pictures, {run['elapsed'] / 60:.1f} minutes",
        "loss": f"{losses.nanmean().item():.4f}, velocity MSE over the last {len(losses)} steps" if len(losses) else "",
        "seed": settings["seed"],
        "code": f"[{state['code']}]({CODE})",
        **(metrics or {"quality": "not measured"}),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in made.items() if value != "")
    return f"""---
{front.to_yaml()}
---

# {repo.rpartition("/")[2]}

Pictures of {settings["image_size"]} px from a [LiquidDiffusion]({CODE}) network: closed-form continuous-depth (CfC) blocks, no attention, trained by
rectified flow. These are the averaged weights of the run.
{"![Samples of this model](samples.png)" if grid else ""}

| | |
|---|---|
{rows}

## Sample

In a clone of [the code]({CODE}):

```python
from ld_utils import save_grid
from liquid_diffusion import LiquidDiffusion, RectifiedFlow

flow = RectifiedFlow(LiquidDiffusion.from_pretrained("{repo}"))
images = flow.sample(16, image_size={settings["image_size"]}, num_steps=50, seed=0)  # [16, 3, H, W] in [-1, 1]
save_grid(images, "samples.png", columns=4)
```

## Licence

{LICENCE_NOTE}: {note}.
"""


def describe_source(source):
    """(what a run's pictures were, a note on their licence, whether they are a set on the Hub); names no local folder."""
    if source == "samples":
        return "the emoji faces that come with the code", SAMPLES_NOTE, False
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not Path(source).exists():
        page = f"https://huggingface.co/datasets/{source}"
        return f"[{source}]({page})", f"see the page of [{source}]({page}) before you use them", True
    return "the author's own", "ask the author before you use them", False
