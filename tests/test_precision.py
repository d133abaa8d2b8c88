"""Number formats: refused where the device lacks them, and at work where it has them."""

import pytest
import torch

from vip.precision import Precision, PrecisionConfig

CPU = torch.device("cpu")


def test_fp16_needs_cuda() -> None:
    with pytest.raises(
        ValueError, match=r"^precision=fp16: needs a CUDA device, this is cpu; take precision=fp32 or bf16$"
    ):
        Precision(PrecisionConfig("fp16"), CPU)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_matrix_products_have_the_format(name: str, dtype: torch.dtype) -> None:
    precision = Precision(PrecisionConfig(name), CPU)  # type: ignore[arg-type]
    layer = torch.nn.Linear(4, 4)
    with precision.autocast():
        out = layer(torch.ones(2, 4))
    assert out.dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == torch.float32, "outside of autocast nothing changes"
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_no_loss_scaling_where_none_is_needed(name: str) -> None:
    scaler = Precision(PrecisionConfig(name), CPU).scaler  # type: ignore[arg-type]
    loss = torch.ones(1)
    assert scaler.scale(loss) is loss
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_without_bf16_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    said = Precision(PrecisionConfig("bf16"), CPU).drawback()
    assert said is None if has_bf16 else said.startswith("precision=bf16: this CPU has no instructions for it")
    assert Precision(PrecisionConfig("fp32"), CPU).drawback() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_scales_the_loss_on_cuda() -> None:
    precision = Precision(PrecisionConfig("fp16"), torch.device("cuda", 0))
    loss = torch.ones((), device="cuda")
    assert precision.scaler.scale(loss).item() > 1
    with precision.autocast():
        assert (
            torch.nn.functional.linear(torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda")).dtype
            == torch.float16
        )
