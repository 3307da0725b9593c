"""Test-time defences once more, in plain tensor operations: one image at a time, every view and every class prompt by
itself, all views in one graph, torch's own optimiser. Written from the papers, not from the package.

Views of an image are given as a tensor (V, 3, S, S), the image itself first; prompts as a dictionary by the names that
the parameters have in the classifier.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from plain_forward import block, text_feature
from prompted_clip import make_images
from torch import Tensor
from torch.nn import functional as F

from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.fit import fingerprints
from hf_robust_clip.defences.moments import VisionStatistics

CONTEXT = "text_model.embeddings.token_embedding.clip_prompt_tokens.default"
Prompts = dict[str, Tensor]
Inputs = list[list[Tensor]]  # of each view, of each layer: (T, D)
Loss = Callable[[Tensor, Inputs], Tensor]  # of the kept views: logits (K, C), inputs of their layers


@dataclass
class Tuned:
    """What tuning on one image found; names as in `Adaptation`, and entropies (V,) and the first gradients."""

    entropies: Tensor
    kept: list[int]
    loss: Tensor
    gradients: Prompts
    prompts: Prompts
    logits: Tensor


class NaiveCLIP:
    """The weights and token ids of a classifier, and a forward of one view and of one class."""

    def __init__(self, classifier: torch.nn.Module):
        state = classifier.state_dict()
        self.weights = {
            name.replace(".base_layer", ""): value.clone()
            for name, value in state.items()
            if ".clip_prompt_" not in name
        }
        self.config, self.mean, self.std = classifier.config, classifier.image_mean, classifier.image_std
        self.scale = self.weights["logit_scale"].exp()
        (template,) = classifier.templates
        tokenizer = classifier.processor.tokenizer
        self.rows = [tokenizer(template.replace("{}", name)).input_ids for name in classifier.class_names]

    def words(self, count: int) -> Tensor:
        """The embeddings of the `count` tokens after the start, which must be the same for all classes."""
        rows = {tuple(row[1 : 1 + count]) for row in self.rows}
        assert len(rows) == 1
        return self.weights["text_model.embeddings.token_embedding.weight"][list(rows.pop())].clone()

    def view(self, view_CHW: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The feature (D,) of one view in [0, 1], and what each layer read, (T, width)."""
        weights, vision = self.weights, self.config.vision_config
        side, size = vision.image_size, vision.patch_size
        pixels = (view_CHW - self.mean) / self.std

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = (weights[f"vision_model.{name}.{leaf}"] for leaf in ("weight", "bias"))
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

        kernel = weights["vision_model.embeddings.patch_embedding.weight"].flatten(1)
        corners = [(top, left) for top in range(0, side, size) for left in range(0, side, size)]
        tokens = [kernel @ pixels[:, top : top + size, left : left + size].flatten() for top, left in corners]
        x = torch.stack([weights["vision_model.embeddings.class_embedding"], *tokens])
        x = x + weights["vision_model.embeddings.position_embedding.weight"]
        own = len(x)
        x = norm("pre_layrnorm", torch.cat([x, *prompts[:1]]))
        inputs = []
        for i in range(vision.num_hidden_layers):
            if 0 < i < len(prompts):
                x = torch.cat([x[:own], prompts[i]])
            inputs.append(x)
            name = f"vision_model.encoder.layers.{i}."
            x = block(weights, name, x, vision.num_attention_heads, vision.hidden_act, causal=False)
        return weights["visual_projection.weight"] @ norm("post_layernorm", x[0]), inputs

    def classes(self, prompts: Sequence[Tensor]) -> Tensor:
        """The unit features (C, D) of the classes, each prompt padded to the whole context."""
        features = [text_feature(self.weights, self.config, row, list(prompts)) for row in self.rows]
        return torch.stack([feature / feature.norm() for feature in features])

    def logits(self, views_VCHW: Tensor, prompts: Prompts) -> tuple[Tensor, Inputs]:
        """Logits (V, C) of views under prompts, and what the layers read."""
        vision, text = by_layer(prompts)
        classes_CD = self.classes(text)
        rows, inputs = [], []
        for view in views_VCHW:
            feature, read = self.view(view, vision)
            rows.append(self.scale * classes_CD @ (feature / feature.norm()))
            inputs.append(read)
        return torch.stack(rows), inputs


def own_prompts(classifier: torch.nn.Module) -> Prompts:
    """Copies of all parameters of the prompts in a classifier."""
    return {n: p.detach().clone() for n, p in classifier.named_parameters() if ".clip_prompt_" in n}


def by_layer(prompts: Prompts) -> tuple[list[Tensor], list[Tensor]]:
    """The prompts of the vision and of the text tower, layer by layer; coupled ones are made by their linear maps."""
    tokens: dict[str, dict[int, Tensor]] = {"vision": {}, "text": {}}
    maps: dict[str, dict[int, dict[str, Tensor]]] = {"vision": {}, "text": {}}
    for name, value in prompts.items():
        pieces = name.split(".")
        tower = pieces[0].removesuffix("_model")
        place = int(pieces[pieces.index("layers") + 1]) if "layers" in pieces else 0
        if "clip_prompt_tokens" in pieces:
            tokens[tower][place] = value
        else:
            maps[tower].setdefault(place, {})[pieces[-1]] = value
    found = {tower: dict(own) for tower, own in tokens.items()}
    for tower, other in (("vision", "text"), ("text", "vision")):
        for place, linear in maps[tower].items():
            made = [linear["weight"] @ token + linear["bias"] for token in tokens[other][place]]
            found[tower][place] = torch.stack(made)
    vision, text = ([found[tower][i] for i in sorted(found[tower])] for tower in ("vision", "text"))
    return vision, text


def targets_of(classifier: torch.nn.Module) -> AlignmentTargets:
    """Statistics near those of a classifier in float64, but nowhere equal: |m - mu| has no derivative at 0, where its
    own prompts would lie."""
    clip, vision = NaiveCLIP(classifier), by_layer(own_prompts(classifier))[0]
    read = [clip.view(image, vision)[1] for image in make_images(4, seed=9)]
    layers = [torch.stack([own[i] for own in read]) for i in range(len(read[0]))]
    mean, variance = (torch.stack(moments) for moments in zip(*((x.mean(0), x.var(0)) for x in layers), strict=True))
    generator = torch.Generator().manual_seed(4)
    model, prompts = fingerprints(classifier)
    record = {"model_fingerprint": model, "prompts_fingerprint": prompts}

    def shifted() -> VisionStatistics:
        moved = 0.3 * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        spread = 1 + torch.rand(mean.shape, generator=generator, dtype=mean.dtype)
        return VisionStatistics(mean + moved, variance * spread + 0.01, 4, record)

    return AlignmentTargets(adversarial=shifted(), clean=shifted())


# ---- losses of the kept views


def entropy(probabilities_C: Tensor) -> Tensor:
    return -(probabilities_C * probabilities_C.log()).sum()


def entropy_of_the_mean(logits_KC: Tensor, inputs: Inputs) -> Tensor:
    """H(mean_i softmax z_i): TPT."""
    return entropy(torch.stack([logits_C.softmax(0) for logits_C in logits_KC]).mean(0))


def mean_of_the_entropies(logits_KC: Tensor, inputs: Inputs) -> Tensor:
    """mean_i H(softmax z_i): R-TPT."""
    return torch.stack([entropy(logits_C.softmax(0)) for logits_C in logits_KC]).mean()


@dataclass
class Alignment:
    """L_x: the distance between the moments over the kept views and stored moments, (L, T, D) each.

    `norm` takes L1 norms over tokens and channels and their mean over layers; `mean` takes half the mean absolute
    differences and their sum over layers.
    """

    layers: int
    reduction: str
    unbiased: bool

    def __call__(self, inputs: Inputs, mean_LTD: Tensor, variance_LTD: Tensor) -> Tensor:
        distances = []
        count = len(inputs)
        for i in range(min(self.layers, len(mean_LTD))):
            mean = sum(read[i] for read in inputs) / count
            variance = sum((read[i] - mean) ** 2 for read in inputs) / (count - int(self.unbiased))
            if self.reduction == "norm":
                distances.append((mean - mean_LTD[i]).abs().sum() + (variance - variance_LTD[i]).abs().sum())
            else:
                halves = (mean - mean_LTD[i]).abs().mean() / 2, (variance - variance_LTD[i]).abs().mean() / 2
                distances.append(halves[0] + halves[1])
        total = torch.stack(distances).sum()
        return total / len(distances) if self.reduction == "norm" else total


@dataclass
class TAPTLoss:
    """H(mean_i softmax z_i) + weight * (gamma * L_adv + (1 - gamma) * L_clean)."""

    adversarial: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    weight: float
    gamma: float
    alignment: Alignment

    def __call__(self, logits_KC: Tensor, inputs: Inputs) -> Tensor:
        adversarial, clean = self.alignment(inputs, *self.adversarial), self.alignment(inputs, *self.clean)
        distance = self.gamma * adversarial + (1 - self.gamma) * clean
        return entropy_of_the_mean(logits_KC, inputs) + self.weight * distance


@dataclass
class PromptAlignLoss:
    """TPT's loss + 100 / 3 * the distance of layers 0 and 1."""

    statistics: tuple[Tensor, Tensor]

    def __call__(self, logits_KC: Tensor, inputs: Inputs) -> Tensor:
        distance = Alignment(2, "mean", False)(inputs, *self.statistics)
        return entropy_of_the_mean(logits_KC, inputs) + 100 / 3 * distance


# ---- tuning


def tune(
    clip: NaiveCLIP,
    prompts: Prompts,
    views_VCHW: Tensor,
    loss: Loss,
    num_kept: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    num_steps: int = 1,
) -> Tuned:
    """Keep the views of lowest entropy, take fresh AdamW steps on all prompts, predict on view 0."""
    tensors = {name: value.detach().clone().requires_grad_() for name, value in prompts.items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=learning_rate, weight_decay=weight_decay)
    entropies_V, kept, first_loss, first_gradients = None, None, None, None
    for _ in range(num_steps):
        logits_VC, inputs = clip.logits(views_VCHW, tensors)
        if kept is None:
            entropies_V = torch.stack([entropy(row.softmax(0)) for row in logits_VC]).detach()
            kept = sorted(range(len(logits_VC)), key=lambda i: float(entropies_V[i]))[:num_kept]
        value = loss(logits_VC[kept], [inputs[i] for i in kept])
        optimizer.zero_grad()
        value.backward()
        if first_loss is None:
            first_loss = value.detach()
            first_gradients = {
                name: torch.zeros_like(t) if t.grad is None else t.grad.clone() for name, t in tensors.items()
            }
        optimizer.step()
    tuned = {name: tensor.detach() for name, tensor in tensors.items()}
    with torch.no_grad():
        logits_C = clip.logits(views_VCHW[:1], tuned)[0][0]
    return Tuned(entropies_V, kept, first_loss, first_gradients, tuned, logits_C)


def differentiable_logits(
    clip: NaiveCLIP,
    prompts: Prompts,
    views_VCHW: Tensor,
    loss: Loss,
    kept: list[int],
    learning_rate: float,
    weight_decay: float = 0.01,
) -> Tensor:
    """The logits (C,) of view 0 after one first step p (1 - lr wd) - lr g / (|g| + eps), with a graph back to the
    views through g."""
    tensors = {name: value.detach().clone().requires_grad_() for name, value in prompts.items()}
    logits_VC, inputs = clip.logits(views_VCHW, tensors)
    value = loss(logits_VC[kept], [inputs[i] for i in kept])
    gradients = torch.autograd.grad(value, list(tensors.values()), create_graph=True)
    tuned = {
        name: p * (1 - learning_rate * weight_decay) - learning_rate * g / (g.abs() + 1e-8)
        for (name, p), g in zip(tensors.items(), gradients, strict=True)
    }
    return clip.logits(views_VCHW[:1], tuned)[0][0]


# ---- methods with a prediction of their own


def r_tpt_weights(clip: NaiveCLIP, views_VCHW: Tensor, vision: Sequence[Tensor] = ()) -> Tensor:
    """(V,): softmax of the mean of the 20 largest cosines with the other views (all of fewer), divided by 0.01."""
    features = [clip.view(view, vision)[0] for view in views_VCHW]
    means = []
    for i, a in enumerate(features):
        cosines = sorted(
            (float(a @ b / (a.norm() * b.norm())) for j, b in enumerate(features) if j != i), reverse=True
        )
        top = cosines[:20]
        means.append(sum(top) / len(top) / 0.01)
    largest = max(means)
    weights = torch.tensor([math.exp(mean - largest) for mean in means], dtype=torch.float64)
    return weights / weights.sum()


def r_tpt_logits(clip: NaiveCLIP, views_VCHW: Tensor, tuned: Prompts) -> Tensor:
    """sum_i w_i z_i over all views, with the tuned words and the weights of the untuned features."""
    weights_V = r_tpt_weights(clip, views_VCHW, by_layer(tuned)[0])
    logits_VC = clip.logits(views_VCHW, tuned)[0]
    return sum(weight * logits_C for weight, logits_C in zip(weights_V, logits_VC, strict=True))


def counter_attack(
    clip: NaiveCLIP,
    image_CHW: Tensor,
    start_CHW: Tensor,
    vision: Sequence[Tensor] = (),
    eps: float = 4 / 255,
    step: float = 1 / 255,
    num_steps: int = 2,
    beta: float = 2.0,
    tau: float = 0.2,
) -> tuple[Tensor, float]:
    """TTC's image x + sum_k w_k d_k, w_k ~ exp(beta k), for noise d_0 = `start_CHW`; and the drift ratio of d_0. Where
    the ratio is not below tau the image is x + d_0."""
    with torch.no_grad():
        here = clip.view(image_CHW, vision)[0]

    def legal(delta: Tensor) -> Tensor:
        return (image_CHW + delta.clamp(-eps, eps)).clamp(0, 1) - image_CHW

    delta = legal(start_CHW)
    with torch.no_grad():
        ratio = float((clip.view(image_CHW + delta, vision)[0] - here).norm() / here.norm())
    deltas = [delta]
    for _ in range(num_steps):
        moved = deltas[-1].detach().clone().requires_grad_()
        distance = ((clip.view(image_CHW + moved, vision)[0] - here) ** 2).sum()
        (gradient,) = torch.autograd.grad(distance, moved)
        deltas.append(legal(moved.detach() + step * gradient.sign()))
    if not ratio < tau:
        return image_CHW + deltas[0], ratio
    weights = [math.exp(beta * k) for k in range(num_steps + 1)]
    mixed = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)) / sum(weights)
    return image_CHW + mixed, ratio


def ensemble_probabilities(clip: NaiveCLIP, views_VCHW: Tensor, prompts: Prompts) -> Tensor:
    """(C,): the mean of the predictions on all views."""
    rows = [logits_C.softmax(0) for logits_C in clip.logits(views_VCHW, prompts)[0]]
    return sum(rows) / len(rows)
