"""Draws inside a model: masks depend on seed, step and position of the sample, however samples are put into batches."""

import pytest
import torch
import transformers
from torch import nn

from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.interop.transformers import _draw_by_sample
from focalclip.models.clip import FocalCLIP
from focalclip.models.draws import Dropout, DropPath, sample_draws, use_sample_draws

N = 8


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT with dropout of hidden states and of attention weights."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    transformers.BertConfig(vocab_size=len(words), max_position_embeddings=8, **sizes, **rates).save_pretrained(folder)
    return f"transformers:{folder}"


def model(image=None, text=None):
    torch.manual_seed(0)
    small = {"name": "focalnet_pico", "image_size": 32, "drop_path": 0.5} | (image or {})
    tower = {"context_length": 8, "width": 32, "heads": 2, "layers": 1} | (text or {})
    config = ModelConfig(embed_dim=16, image=ImageTowerConfig(**small), text=TextTowerConfig(**tower))
    built = FocalCLIP(config).train()
    for name, parameter in built.named_parameters():
        if "gamma" in name:
            nn.init.ones_(parameter)
    return built


def model_with_bert(name):
    torch.manual_seed(0)
    image = ImageTowerConfig(name="focalnet_pico", image_size=32)
    return FocalCLIP(ModelConfig(embed_dim=16, image=image, text=TextTowerConfig(name=name, context_length=8))).train()


TOWERS = {
    "ours": {"image": {"options": {"dropout": 0.2}}},
    "checkpointing": {"image": {"activation_checkpointing": True}},
    "timm": {
        "image": {
            "name": "timm:swin_tiny_patch4_window7_224",
            "image_size": 64,
            "options": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
            | {"proj_drop_rate": 0.2},
        },
    },
}


def outputs(built, images, tokens, batches, seed=1, step=5):
    """Embeddings and the gradient of one parameter, batch by batch."""
    results = []
    built.zero_grad()
    for rows in batches:
        rows = torch.tensor(rows)
        with sample_draws(seed, step, rows + 1000):
            named = built(images[rows], tokens[rows])
            (named["image"].sum() + named["text"].sum()).backward()
        results.append(torch.cat([named["image"], named["text"]], 1).detach())
    return torch.cat(results), built.visual.proj.weight.grad.clone()


@pytest.mark.parametrize("tower", [*TOWERS, "bert"])
def test_embeddings_do_not_depend_on_the_batch_and_no_generator_moves(tower, bert):
    built = model_with_bert(bert) if tower == "bert" else model(**TOWERS[tower])
    generator = torch.Generator().manual_seed(0)
    size = built.config.image.image_size
    images, tokens = (
        torch.randn(N, 3, size, size, generator=generator),
        torch.randint(5, 7, (N, 8), generator=generator),
    )
    before = torch.get_rng_state()
    whole, gradient = outputs(built, images, tokens, [range(N)])
    parts, parts_gradient = outputs(built, images, tokens, [range(2), range(2, 4), [4, 5, 6, 7]])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_gradient, gradient)
    assert not torch.allclose(outputs(built, images, tokens, [range(N)], step=6)[0], whole)
    assert not torch.allclose(outputs(built, images, tokens, [range(N)], seed=2)[0], whole)


def test_masks_have_their_rate_and_are_independent():
    positions = torch.arange(20_000)
    paths = nn.Sequential(DropPath(0.25), DropPath(0.25)).train()
    use_sample_draws(paths)
    x = torch.ones(len(positions), 1)
    with sample_draws(3, 7, positions):
        first, second = (path(x) > 0 for path in paths)
    with sample_draws(3, 8, positions):
        later = paths[0](x) > 0
    for mask in (first, second, later):
        assert mask.float().mean().item() == pytest.approx(0.75, abs=0.01)  # 3 standard deviations
    for a, b in ((first, second), (first, later), (first[1:], first[:-1])):
        assert (a & b).float().mean().item() == pytest.approx(0.75**2, abs=0.011)


def test_elements_of_a_sample_are_independent_and_the_mean_is_kept():
    module = Dropout(0.4).train()
    with sample_draws(0, 0, torch.arange(50)):
        x = module(torch.ones(50, 40, 30))
    kept = x > 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.006)
    assert x.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (kept[:, 1:] & kept[:, :-1]).float().mean().item() == pytest.approx(0.36, abs=0.006)
    assert len({tuple(row.flatten().tolist()) for row in kept}) == 50


def test_attention_without_dropout_is_that_of_transformers(bert):
    torch.manual_seed(0)
    ours = model_with_bert(bert).text.transformer
    config = transformers.BertConfig.from_pretrained(bert.removeprefix("transformers:"))
    theirs = transformers.BertModel(config, add_pooling_layer=False)
    theirs.load_state_dict(ours.state_dict())
    theirs.set_attn_implementation("eager")
    tokens = torch.randint(5, 7, (3, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
    for module in (ours, theirs):
        module.eval()
    expected = theirs(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours(input_ids=tokens, attention_mask=mask).last_hidden_state, expected)
    # with dropout, its mean over many masks is the attention without
    for layer in ours.encoder.layer:
        layer.attention.self.train()
    means = []
    for step in range(400):
        with sample_draws(0, step, torch.arange(3)):
            means.append(ours(input_ids=tokens, attention_mask=mask).last_hidden_state.detach())
    kept = mask.bool()
    torch.testing.assert_close(torch.stack(means).mean(0)[kept], expected[kept], atol=0.1, rtol=0)


def test_attention_with_dropout_is_causal_where_the_encoder_is(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPTextConfig(vocab_size=8, max_position_embeddings=8, attention_dropout=1e-7, **sizes)
    encoder = transformers.CLIPTextModel(config)
    use_sample_draws(encoder)
    _draw_by_sample(encoder)
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    states = []
    for mode in (encoder.train(), encoder.eval()):
        with sample_draws(0, 0, torch.arange(2)):
            states.append(mode(input_ids=tokens).last_hidden_state)
    torch.testing.assert_close(states[0][0, :2], states[0][1, :2])
    torch.testing.assert_close(*states)
