"""Processes of their own for `test_peft_contract`; the first argument names one of the last functions."""

import sys
from pathlib import Path


def reload(folder: Path, first: str) -> None:
    """Load every adapter that lies in `folder` on the base beside it, in three ways, and compare with its logits."""
    import importlib

    assert not {"peft", "hf_robust_clip"} & sys.modules.keys()
    for name in (first, "hf_robust_clip", "peft"):
        importlib.import_module(name)
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model

    from hf_robust_clip import CLIPForZeroShotClassification

    count = 0
    for wanted_file in sorted(folder.glob("*.pt")):
        wanted = torch.load(wanted_file, weights_only=True)
        adapter = wanted_file.with_suffix("")

        def base(wanted=wanted):
            model = CLIPForZeroShotClassification.from_pretrained(folder / "base", dtype=torch.float64).eval()
            model.set_classes(wanted["names"], wanted["template"])
            return model

        loaded = PeftModel.from_pretrained(base(), adapter)
        again = get_peft_model(base(), PeftConfig.from_pretrained(adapter)).eval()
        again.load_state_dict(wanted["state"])
        own = base()
        own.load_adapter(adapter)
        for model in (loaded, again, own):
            torch.testing.assert_close(
                model(pixel_values=wanted["images"]).logits, wanted["logits"], rtol=0, atol=1e-12
            )
            count += 1
    print(f"{count} equal", flush=True)


def strange(folder: Path) -> None:
    """What a process sees that knows PEFT but not this package."""
    from peft import PeftModel
    from transformers import CLIPModel

    assert "hf_robust_clip" not in sys.modules
    base = CLIPModel.from_pretrained(folder / "base")
    adapter = next(folder.glob("*.pt")).with_suffix("")
    for load in (base.load_adapter, CLIPModel.from_pretrained):
        try:
            load(adapter)
        except KeyError as error:
            print(repr(error))
    PeftModel.from_pretrained(base, adapter)


def push(repo: str) -> None:
    """Push an adapter and its base to the Hub and load them again."""
    import torch
    from peft import PeftModel, get_peft_model
    from prompted_clip import NAMES, TEMPLATE, make_base, make_config, make_images, randomise
    from transformers import CLIPModel

    from hf_robust_clip.modeling import CLIPForZeroShotClassification

    def base():
        model = CLIPForZeroShotClassification.from_pretrained("user/base", dtype=torch.float64).eval()
        model.set_classes(NAMES, TEMPLATE)
        return model

    make_base().push_to_hub("user/base")
    model = get_peft_model(base(), make_config("VLI"))
    randomise(model, 1)
    wanted = model.eval()(pixel_values=make_images()).logits
    model.push_to_hub(repo)
    loaded = PeftModel.from_pretrained(base(), repo)
    torch.testing.assert_close(loaded(pixel_values=make_images()).logits, wanted, rtol=0, atol=1e-12)
    plain = CLIPModel.from_pretrained(repo, dtype=torch.float64)
    theirs, own = plain.state_dict(), model.get_base_model().state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


def train_steps(row: str, rank: int, world: int, wrap=lambda model: model) -> dict:
    """Three SGD steps on this rank's share of every batch; the trained parameters."""
    import torch
    from prompted_clip import NAMES, make_images, make_prompted, prompt_parameters

    model = make_prompted(row).train()
    parameters = prompt_parameters(model)
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    run = wrap(model)
    images, labels = make_images(8, seed=3), torch.arange(8) % len(NAMES)
    for step in range(3):
        batch = torch.arange(8).roll(step)[rank::world]
        optimiser.zero_grad()
        run(pixel_values=images[batch], labels=labels[batch]).loss.backward()
        optimiser.step()
    return {name: value.detach() for name, value in parameters.items()}


def rank(folder: Path, number: int) -> None:
    """One of two processes, each with half of every batch."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    (folder / "ranks").mkdir(exist_ok=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    for row in ("VLI", "VLJ"):
        torch.save(train_steps(row, number, 2, DistributedDataParallel), folder / "ranks" / f"{row}-{number}.pt")
    torch.distributed.destroy_process_group()


def package_first(folder: Path) -> None:
    """Imports this package, then PEFT."""
    reload(folder, "hf_robust_clip")
    rank(folder, 0)


def peft_first(folder: Path) -> None:
    """Imports PEFT, then this package."""
    reload(folder, "peft")
    rank(folder, 1)
    push("user/adapter")


if __name__ == "__main__":
    {"package_first": package_first, "peft_first": peft_first, "strange": strange}[sys.argv[1]](Path(sys.argv[2]))
