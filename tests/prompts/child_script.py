"""Processes of their own for `test_peft_contract`; each function is one, named by the first argument."""

import os
import sys
from pathlib import Path


def reload(folder: Path, first: str) -> None:
    """Load every adapter that lies in `folder` on the base beside it, in three ways, and compare with its logits."""
    import importlib

    assert first == sys.modules.get("peft", first)  # nothing has imported it yet
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
            assert torch.equal(model(pixel_values=wanted["images"]).logits, wanted["logits"]), adapter
            count += 1
    print(f"{count} equal")


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


def push(folder: Path, repo: str) -> None:
    """Push an adapter to the Hub and load it again, on a base that lies there too."""
    import torch
    from peft import PeftModel
    from prompted_clip import NAMES, TEMPLATE, make_base, make_config, make_images, randomise
    from transformers import CLIPModel

    from hf_robust_clip.modeling import CLIPForZeroShotClassification

    def base():
        model = CLIPForZeroShotClassification.from_pretrained("user/base", dtype=torch.float64).eval()
        model.set_classes(NAMES, TEMPLATE)
        return model

    from peft import get_peft_model

    make_base().push_to_hub("user/base")
    model = get_peft_model(base(), make_config("VLI"))
    randomise(model, 1)
    wanted = model.eval()(pixel_values=make_images()).logits
    model.push_to_hub(repo)
    loaded = PeftModel.from_pretrained(base(), repo)
    assert torch.equal(loaded(pixel_values=make_images()).logits, wanted)
    plain = CLIPModel.from_pretrained(repo, dtype=torch.float64)
    theirs, own = plain.state_dict(), model.get_base_model().state_dict()
    assert theirs.keys() == {name.replace(".default", ".default") for name in own}
    assert all(torch.equal(theirs[name], own[name]) for name in own)


def rank(folder: Path, number: str) -> None:
    """One of two processes, each with half of every batch."""
    import torch
    from test_peft_contract import train_steps
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(number), world_size=2
    )
    for row in ("VLI", "VLJ"):
        torch.save(train_steps(row, int(number), 2, DistributedDataParallel), folder / f"{row}-{number}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
