import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.clean import Clean
from hf_robust_clip.objectives.coop import CoOp


def test_loss_is_that_of_clean_training_whatever_the_attack_found():
    images = torch.rand(3, 4, 1, 1, dtype=torch.float64)
    batch = Batch((images,), torch.tensor([0, 3, 2]), None, lambda x: ZeroShotOutput(logits=x.flatten(1)))
    assert CoOp()(batch, 1 - images) == Clean()(batch, images)
    assert not CoOp.attacked


def test_it_trains_four_shared_words_at_the_input():
    config = CoOp.peft_config
    assert (config.design, config.num_text_tokens, config.text_depth) == ("T", 4, 1)
