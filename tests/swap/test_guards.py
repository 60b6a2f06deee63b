"""Guards see every change that ``why_not`` sees, at every place of a block, and keep nothing alive."""

import contextlib
import gc
import weakref

import pytest
import torch
from timm.layers import Attention, LayerNorm, Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import nn

from vitkernels import accelerate
from vitkernels.swap import _rules
from vitkernels.swap._guards import Guards


def block(**options) -> Block:
    made = Block(16, 2, qkv_bias=True, init_values=0.1, drop_path=0.1, **options)
    accelerate(made)
    return made


@pytest.fixture
def guarded(monkeypatch):
    """A swapped block, and what its guard and ``why_not`` say of it now."""
    module = block()
    rule = _rules.RULES[type(module)]
    guards = Guards()
    assert _rules.why_not(rule, module) is None
    guards.add(rule, module, _rules.RULES)
    assert guards.any(module)
    return module, lambda: (guards.any(module), _rules.why_not(rule, module) is None)


PATHS = [path for path, _ in block().named_modules() if path]


@contextlib.contextmanager
def attribute(owner, name, value):
    before = vars(owner).get(name, contextlib)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is contextlib else setattr(owner, name, before)


@contextlib.contextmanager
def replaced(children, name, value):
    before = children.get(name)
    children[name] = value
    try:
        yield
    finally:
        if before is None:
            del children[name]
        else:
            children[name] = before


def test_the_paths_are_those_of_a_block():
    assert {"norm1", "attn.qkv", "attn.q_norm", "mlp.drop2", "ls2", "drop_path1"} <= set(PATHS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(guarded, path, register):
    module, says = guarded
    handle = getattr(module.get_submodule(path), register)(lambda *_: None)
    assert says() == (False, False)
    handle.remove()
    assert says() == (True, True)


@pytest.mark.parametrize("path", PATHS)
def test_another_class_and_a_bound_forward(guarded, path):
    module, says = guarded
    child = module.get_submodule(path)
    with attribute(child, "forward", lambda x: x):
        assert says() == (False, False)
    own = type(child)
    child.__class__ = type("Mine", (own,), {})
    assert says() == (False, False)
    child.__class__ = own
    assert says() == (True, True)


@pytest.mark.parametrize("path", PATHS)
def test_another_child(guarded, path):
    module, says = guarded
    parent, _, name = path.rpartition(".")
    with replaced(module.get_submodule(parent)._modules, name, nn.Tanh()):
        assert says() == (False, False)
    with replaced(module._modules, "adapter", nn.Linear(1, 1)):
        assert says() == (False, False)
    assert says() == (True, True)


@pytest.mark.parametrize("path", PATHS)
def test_parameters(guarded, path):
    module, says = guarded
    own = module.get_submodule(path)._parameters
    with replaced(own, "extra", nn.Parameter(torch.zeros(1))):
        fit = path in ("mlp", "attn") or not own.keys() - {"extra"}
        assert says()[0] is False
        assert says()[1] is False or fit
    for name, parameter in list(own.items()):
        for other in (parameter.detach(), nn.Parameter(parameter.double()), nn.Parameter(parameter.half())):
            with replaced(own, name, other):
                assert says() == (False, False), (name, other.dtype)
    assert says() == (True, True)


@pytest.mark.parametrize("cls", [Attention, LayerNorm, Mlp, LayerScale, nn.Linear, nn.Dropout, nn.Identity, Block])
@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_replaced_methods(guarded, cls, method):
    _, says = guarded
    called = cls is Block and method == "__call__"  # the block itself is called
    with attribute(cls, method, lambda self, x: x):
        assert says() == (called, called)
    assert says() == (True, True)


def test_limits_and_global_hooks(guarded):
    module, says = guarded
    for owner, name, value in ((module.ls1, "inplace", True), (module.attn, "head_dim", 4096)):
        with attribute(owner, name, value):
            assert says() == (False, False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert says() == (False, False)
    handle.remove()
    with attribute(nn.Module, "__call__", lambda self, *a: None):
        assert says() == (False, False)
    assert says() == (True, True)


def test_another_dtype_gets_a_guard_of_its_own(guarded):
    module, says = guarded
    module.double()
    assert says() == (False, True)


def test_one_guard_serves_all_blocks_and_keeps_none_alive():
    first, second = block(), block()
    rule, guards = _rules.RULES[type(first)], Guards()
    guards.add(rule, first, _rules.RULES)
    assert guards.any(second)
    gone = [weakref.ref(thing) for thing in (first, first.attn.qkv, first.attn.qkv.weight)]
    del first
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert guards.any(second)


def test_few_guards_are_written():
    module = block()
    rule, guards = _rules.RULES[type(module)], Guards()
    for _ in range(3 * Guards.MOST):
        guards.add(rule, module, _rules.RULES)
    assert len(guards._guards) == Guards.MOST
