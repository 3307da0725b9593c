"""BaFTA: the worked numbers, a naive version in float64, what a stream may and may not change, and its attacks."""

import math
from dataclasses import replace

import pytest
import torch
from naive import NaiveCLIP
from prompted_clip import NAMES, TEMPLATE, make_base, make_images

from hf_robust_clip.attacks.suites import find_adversarial
from hf_robust_clip.crops import RandomResizedCrop
from hf_robust_clip.defences.bafta import BaFTA, BaFTAState, TextSpace, renyi_entropy, text_projection
from hf_robust_clip.defences.views import draw_boxes
from hf_robust_clip.evaluation.attack_views import AdaptiveWorst, Scene
from hf_robust_clip.threat_model import ThreatModel

VIEWS = 5


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def near(found, wanted, atol=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), rtol=0, atol=atol)


TEXTS = rows([0.8, 0.6, 0], [0.8, 0, 0.6], [0.6, 0.48, 0.64])


def worked_state():
    space = TextSpace(text_projection(TEXTS), NAMES[:3], TEXTS, ("", ""))
    return BaFTAState(space.project(TEXTS), torch.zeros(3, dtype=torch.long), space)


# ---- worked numbers


def test_the_projection_and_the_first_centroids():
    near(torch.linalg.svdvals(TEXTS), [1.586924, 0.609067, 0.332732])
    state = worked_state()
    wanted = rows([0.366146, -0.311109, -0.367824], [-0.311109, 0.847301, -0.180536], [-0.367824, -0.180536, 0.786553])
    near(state.space.projection_DD, wanted)
    centroids = rows([0.216570, 0.528921, -0.820573], [0.178133, -0.881039, 0.438223], [-0.596379, 0.377574, 0.708357])
    near(state.centroids_CD, centroids)


def test_a_centroid_moves_towards_an_image():
    state, image = worked_state(), rows(0.48, 0.8, 0.36)
    pi = state.space.project(image)
    near(TEXTS @ image, [0.864, 0.6, 0.9024])
    cosines = state.centroids_CD @ pi
    near(cosines, [0.455661, -0.907777, 0.532603])
    nearest = cosines.argmax(dim=0, keepdim=True)
    wanted = {
        0: [-0.404269, 0.911610, -0.074391],
        1: [-0.571546, 0.736352, 0.362107],
        10: [-0.602662, 0.443603, 0.663337],
    }
    for count, centroid in wanted.items():
        before = replace(state, counts_C=torch.full((3,), count))
        after = before.moved(nearest, pi)
        near(after.centroids_CD[2], centroid)
        assert after.counts_C.tolist() == [count, count, count + 1]
        assert torch.equal(after.centroids_CD[:2], state.centroids_CD[:2])
        assert before.counts_C.tolist() == [count] * 3 and torch.equal(before.centroids_CD, state.centroids_CD)


P, Q = rows([0.7, 0.2, 0.1], [0.4, 0.35, 0.25]).log(), rows([0.2, 0.6, 0.2], [0.1, 0.1, 0.8]).log()


def test_weights_and_aggregates():
    near(renyi_entropy(P, 0.5), [0.940134, 1.089368])
    near(BaFTA().log_weights(P).exp(), [0.144253, 0.008414])
    near(BaFTA(beta=0).aggregate(P).exp(), [0.683465, 0.208267, 0.108267])
    near(BaFTA(beta=0, weights="literal").aggregate(P).exp(), [0.538970, 0.280515, 0.180515])
    near(BaFTA(beta=1).aggregate(P, Q).exp(), [0.313099, 0.211791, 0.475110])
    near(BaFTA(beta=2).aggregate(P, Q).exp(), [0.237373, 0.212511, 0.550116])


def test_views_without_any_weight_count_alike():
    """All are uniform (R = 0), or, in the literal form, all are sure (H = 0): 0 / 0, and a gradient."""
    uniform = torch.full((2, 4), -math.log(4), dtype=torch.float64)
    near(BaFTA().aggregate(uniform, uniform).exp(), [0.25] * 4, 1e-12)
    sure = rows([0, -800, -800], [-800, 0, -800], [-800, 0, -800]).requires_grad_()
    found = BaFTA(beta=0, weights="literal").aggregate(sure)
    near(found.detach().exp(), [1 / 3, 2 / 3, 0], 1e-12)
    found[0].backward()
    assert sure.grad.isfinite().all()


# ---- a naive version


def naive(classifier, defence, images, seed=0, state=None):
    """Logits of images one after the other, and the centroids and counts at the end, in plain loops."""
    clip, size = NaiveCLIP(classifier), classifier.config.vision_config.image_size
    texts = clip.classes([])
    _, vectors = torch.linalg.eigh(texts.T @ texts)
    kept = min(len(texts), texts.shape[1])
    basis = [vectors[:, -1 - i] for i in range(1, kept)]

    def pi(v):
        left = sum((e @ v) * e for e in basis)
        return left / left.norm()

    def reliability(p):
        return 1 - (sum(x**defence.alpha for x in p).log() / (1 - defence.alpha)) / math.log(len(p))

    w, k = ([pi(t) for t in texts], [0] * len(texts)) if state is None else state
    found = []
    for image in images:
        views = draw_boxes(image[None], defence.num_views, defence.crop, seed).render(image[None], size)[0]
        above, below = torch.zeros(len(texts), dtype=torch.float64), 0.0
        for number, view in enumerate(views):
            v = clip.view(view, [])[0]
            v = v / v.norm()
            p = torch.stack([clip.scale * (t @ v) for t in texts]).softmax(0)
            q = torch.stack([clip.scale * (c @ pi(v)) for c in w]).softmax(0)
            above = above + reliability(p) * p + defence.beta * reliability(q) * q
            below = below + reliability(p) + defence.beta * reliability(q)
            if number == 0:
                y, direction = int(q.argmax()), pi(v)
        found.append((above / below).log())
        sums = k[y] * w[y] + direction
        w, k = [*w], [*k]
        w[y], k[y] = sums / sums.norm(), k[y] + 1
    return torch.stack(found), torch.stack(w), k


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_it_equals_a_naive_version(beta):
    classifier, defence, images = make_base(), BaFTA(num_views=VIEWS, beta=beta), make_images(6)
    wanted, centroids, counts = naive(classifier, defence, images, seed=3)
    found = defence.predict(classifier, images, seed=3)
    near(found.logits, wanted, 1e-9)
    near(found.state.centroids_CD, centroids, 1e-9)
    assert found.state.counts_C.tolist() == counts and max(counts) > 1
    near(found.logits.exp().sum(dim=1), torch.ones(6), 1e-12)


def test_the_texts_alone_are_the_stateless_control():
    classifier, images = make_base(), make_images(4)
    control = BaFTA(num_views=VIEWS, beta=0)
    assert control.traits.episodic and control.start(classifier) is None and control.name != BaFTA().name
    found = control.predict(classifier, images)
    assert found.state is None
    near(control.predict(classifier, images.flip(0)).logits.flip(0), found.logits, 1e-10)
    wanted, _, _ = naive(classifier, replace(BaFTA(num_views=VIEWS), beta=0.0), images)
    near(found.logits, wanted, 1e-9)
    near(BaFTA(num_views=VIEWS, beta=1e-12).predict(classifier, images).logits, wanted, 1e-7)
    assert set(control.idle_settings()) < set(control.parameters()) and not BaFTA().idle_settings()


# ---- the stream


def test_a_batch_is_the_scan_of_its_images():
    classifier, images, defence = make_base(), make_images(7), BaFTA(num_views=VIEWS)
    whole, state, alone = defence.predict(classifier, images), None, []
    for image in images.split(1):
        found = defence.predict(classifier, image, state=state)
        state = found.state
        alone.append(found.logits)
    near(torch.cat(alone), whole.logits, 1e-10)
    near(state.centroids_CD, whole.state.centroids_CD, 1e-10)
    assert torch.equal(state.counts_C, whole.state.counts_C)
    for divided in (replace(defence, memory_budget=1e-9), replace(defence, chunk_size=3)):
        near(divided.predict(classifier, images).logits, whole.logits, 1e-10)


def test_an_order_changes_only_what_it_must():
    """What follows an image changes nothing of its logits, what comes before it does; exchanged images of different
    centroids leave the same state."""
    classifier, images, defence = make_base(), make_images(6), BaFTA(num_views=VIEWS)
    found = defence.predict(classifier, images)
    turned = defence.predict(classifier, torch.cat([images[:1], images[1:].flip(0)]))
    near(turned.logits[0], found.logits[0], 1e-10)
    assert (turned.logits[1:].flip(0) - found.logits[1:]).abs().max() > 1e-3
    near(defence.predict(classifier, images[:3]).logits, found.logits[:3], 1e-10)
    nearest = [int(defence.predict(classifier, image[None]).state.counts_C.argmax()) for image in images]
    other = next(i for i, own in enumerate(nearest) if own != nearest[0])
    pair = torch.stack([images[0], images[other]])
    one, swapped = (defence.predict(classifier, own).state for own in (pair, pair.flip(0)))
    assert one.counts_C.max() == 1
    near(one.centroids_CD, swapped.centroids_CD, 1e-12)


def test_what_moves_which_centroid_is_a_choice():
    classifier, images = make_base(), make_images(6)
    states = {
        (by, what): BaFTA(num_views=VIEWS, assigned_by=by, moved_by=what).predict(classifier, images).state
        for by in ("centroids", "text", "aggregate")
        for what in ("image", "views")
    }
    told = BaFTA(num_views=VIEWS, assigned_by="text").predict(classifier, images)
    plain = classifier(images).logits.argmax(dim=1)
    assert told.state.counts_C.tolist() == torch.bincount(plain, minlength=len(NAMES)).tolist()
    aggregate = BaFTA(num_views=VIEWS, assigned_by="aggregate").predict(classifier, images)
    assert aggregate.state.counts_C.tolist() == torch.bincount(aggregate.logits.argmax(1), minlength=6).tolist()
    assert len({tuple(state.centroids_CD.flatten().tolist()) for state in states.values()}) == 6


def hashed(state):
    return [(name, tensor.tolist()) for name, tensor in state.tensors().items()], state.space


def test_no_attack_changes_the_state():
    classifier, images, defence = make_base(), make_images(5), BaFTA(num_views=3)
    state = defence.predict(classifier, images[:3]).state
    before, threat = hashed(state), ThreatModel("8/255")
    labels = classifier(images).logits.argmax(1)
    suite = AdaptiveWorst(pgd_steps=2, apgd_steps=2, num_queries=3)
    with defence.prepared(classifier):
        scene = Scene(defence, classifier, state=state, eot=2)
        for member in suite.members(len(NAMES)):
            victim = member.view.victim(scene, images[3:4])
            adv = find_adversarial(member, victim, images[3:4], labels[3:4], threat)
            assert scene.state is state and hashed(state) == before, member.name
            near(scene.verdict(adv).logits, naive(classifier, defence, adv, state=restart(state))[0], 1e-8)


def restart(state):
    return list(state.centroids_CD), state.counts_C.tolist()


def test_gradients_are_exact_through_views_softmaxes_and_weights():
    """Against differences: boxes are those of the grey levels, which such small steps don't change."""
    classifier, defence = make_base(), BaFTA(num_views=4)
    state = defence.predict(classifier, make_images(4)).state
    image = (make_images(1, seed=9) * 255).round() / 255
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label, step = 2, 1e-5

    def value(pixels, path="none"):
        return defence.predict(classifier, pixels, state=state, path=path).logits[0, label]

    slopes = {}
    for path in ("through", "identity"):
        pixels = image.clone().requires_grad_()
        slopes[path] = (torch.autograd.grad(value(pixels, path), pixels)[0] * direction).sum()
    inside = image.clamp(0.01, 0.99)
    pixels = inside.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(pixels, "through"), pixels)
    change = value(inside + step * direction) - value(inside - step * direction)
    near((grad * direction).sum(), float(change / (2 * step)), 1e-5)
    assert (slopes["through"] - slopes["identity"]).abs() > 1e-4


# ---- projections, and what is refused


def test_more_classes_than_width_leave_all_but_one_direction():
    texts = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double())
    _, _, directions = torch.linalg.svd(texts)
    near(text_projection(texts), torch.eye(4) - torch.outer(directions[0], directions[0]).float(), 1e-6)
    assert torch.linalg.matrix_rank(text_projection(texts, 3)) == 2
    twice = torch.cat([texts[:3], texts[:3]])
    assert torch.linalg.matrix_rank(text_projection(twice)) == 2


def test_arbitrary_and_empty_projections_are_refused():
    with pytest.raises(ValueError, match="equal"):
        text_projection(torch.eye(3, 5))
    with pytest.raises(ValueError, match="one direction"):
        text_projection(TEXTS[:1].repeat(3, 1))
    with pytest.raises(ValueError, match="class 0"):
        text_projection(rows([1, 0, 0], [0.6, 0.8, 0], [0.6, -0.8, 0]))
    mixed, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())
    tied = mixed @ torch.diag(rows(3, 1, 1, 0.5)) @ mixed.T
    with pytest.raises(ValueError, match="max_directions"):
        text_projection(tied, 2)
    assert torch.linalg.matrix_rank(text_projection(tied, 3)) == 2


def test_two_classes_make_hard_votes_and_still_centroids(caplog):
    classifier, images = make_base(), make_images(6)
    classifier.set_classes(NAMES[:2], TEMPLATE)
    defence = BaFTA(num_views=VIEWS)
    start = defence.start(classifier)
    assert torch.linalg.matrix_rank(start.space.projection_DD) == 1
    after = defence.predict(classifier, images).state
    near(after.centroids_CD, start.centroids_CD, 1e-12)
    assert after.counts_C.sum() == 6
    assert any("two classes" in record.message for record in caplog.records)


def test_images_without_direction_leave_no_trace():
    state = worked_state()
    shared = torch.linalg.svd(TEXTS)[2][0]
    for lost in (shared, 5 * shared, torch.zeros(3).double()):
        pi = state.space.project(lost)
        assert pi.tolist() == [0.0] * 3
        after = state.moved(torch.tensor([1]), pi)
        assert torch.equal(after.centroids_CD, state.centroids_CD) and after.counts_C.tolist() == [0, 0, 0]
    once = replace(state, counts_C=torch.tensor([0, 1, 0]))
    assert torch.equal(once.moved(torch.tensor([1]), -state.centroids_CD[1]).centroids_CD, state.centroids_CD)


def test_half_precision_clusters_in_float32():
    classifier, images = make_base(), make_images(3)
    wanted = BaFTA(num_views=VIEWS).predict(classifier, images)
    found = BaFTA(num_views=VIEWS).predict(classifier.to(torch.bfloat16), images.bfloat16())
    assert found.state.centroids_CD.dtype == found.state.space.projection_DD.dtype == torch.float32
    assert found.logits.dtype == torch.float32 and found.logits.isfinite().all()
    near(found.state.centroids_CD.norm(dim=1), torch.ones(6), 1e-5)
    assert wanted.state.centroids_CD.dtype == torch.float64


def test_states_of_others_are_refused():
    classifier, images, defence = make_base(), make_images(2), BaFTA(num_views=VIEWS)
    state = defence.start(classifier)
    with pytest.raises(TypeError, match="state"):
        defence.predict(classifier, images, state=(1, 2))
    with pytest.raises(ValueError, match=r"state\.counts_C"):
        replace(state, counts_C=torch.zeros(2))
    other = make_base()
    with torch.no_grad():
        other.vision_model.post_layernorm.weight[0] += 1
    with pytest.raises(ValueError, match=r"state.*image encoder"):
        defence.predict(other, images, state=state)
    with torch.no_grad():
        classifier.vision_model.post_layernorm.weight[0] += 1  # trained on, the texts untouched
    with pytest.raises(ValueError, match=r"state.*image encoder"):
        defence.predict(classifier, images, state=state)
    other = make_base()
    other.set_classes(NAMES, "d {}.")
    with pytest.raises(ValueError, match=r"state.*embeddings"):
        defence.predict(other, images, state=state)
    other.set_classes(NAMES[::-1], TEMPLATE)
    with pytest.raises(ValueError, match=r"state.*classes"):
        defence.predict(other, images, state=state)
    other.set_classes(NAMES[:1], TEMPLATE)
    with pytest.raises(ValueError, match="one class"):
        defence.start(other)
    defence.predict(make_base(), images, state=state)  # the same model, loaded again


def test_the_crop_is_a_setting():
    classifier, images = make_base(), make_images(2)
    whole = BaFTA(num_views=3, crop=RandomResizedCrop(scale=(1, 1), ratio=(1, 1), flip=0)).predict(classifier, images)
    own, _, _ = naive(classifier, BaFTA(num_views=3, crop=RandomResizedCrop((1, 1), (1, 1), 0)), images)
    near(whole.logits, own, 1e-9)
