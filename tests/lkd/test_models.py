"""Networks return Outputs from their forward pass, under the engine too."""

import pytest
import timm
import torch

from lkd.core.errors import UserError
from lkd.models import build, describe, plain_state_dict
from lkd.models.build import format_description
from lkd.models.small import SMALL_NETWORKS
from meta import call_module


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_small_networks_give_logits_and_stages(name: str) -> None:
    outputs = build(name, 7, 2)(torch.randn(3, 2, 28, 28))
    assert outputs.logits.shape == (3, 7)
    assert all(feature.shape[0] == 3 for feature in outputs.features.values())


@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "resnet18", "mobilenetv3_small_050", "deit_tiny_patch16_224", "convnext_atto"]
)
def test_timm_logits_are_timms_own(name: str) -> None:
    network = build(name, 5).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        outputs = network(images)
        torch.testing.assert_close(outputs.logits, network.model(images), rtol=0, atol=1e-6)
    assert list(outputs.features) == network.stage_names


def test_the_literatures_mobilenet_is_timms_with_relu() -> None:
    network = build("mobilenetv1_100", 1000, options={"act_layer": "relu"})
    described = describe(network, "mobilenetv1_100", (3, 224, 224))
    assert described["parameters"] == 4_231_976
    assert described["activations"] == ["ReLU"]
    assert 1.1e9 < described["flops"] < 1.2e9  # 569 M multiply-adds (Howard et al., 2017)
    assert "4,231,976 parameters" in format_description("student", described)
    assert described["pretrained_tag"] == "none", "its weights are random, though timm knows a tag of it"
    assert describe(network, "mobilenetv1_100", (3, 224, 224), pretrained=True)["pretrained_tag"] != "none"


def test_features_come_without_hooks_under_functional_call() -> None:
    network = build("resnet18", 4)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    before = {name: b.clone() for name, b in network.named_buffers()}
    outputs, buffers = call_module(network, parameters, dict(network.named_buffers()), torch.randn(2, 3, 32, 32))
    outputs.features["layer4"].sum().backward()
    assert parameters["model.conv1.weight"].grad.abs().sum() > 0
    assert all(torch.equal(before[name], b) for name, b in network.named_buffers())
    assert not torch.equal(buffers["model.bn1.running_mean"], before["model.bn1.running_mean"])


def test_a_timm_student_loads_in_timm() -> None:
    network = build("mobilenetv3_small_050", 6)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=6)
    plain.load_state_dict(plain_state_dict(network))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet19", "resnet18"), ("smal_cnn", "small_cnn"), ("resnet50.tv_in2k", "resnet50.tv_in1k")],
)
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=nearest):
        build(name, 10)


def test_options_of_a_small_network_are_refused() -> None:
    with pytest.raises(UserError, match="neither"):
        build("small_cnn", 10, options={"act_layer": "relu"})
    with pytest.raises(UserError, match="cannot be built"):
        build("resnet18", 10, options={"nonsense": 1})
