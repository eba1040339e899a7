"Patches: round trips over many shapes, agreement with timm and with published tables, errors"
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from mim_nb.patches import denormalize_patches, normalize_patches, patch_grid, patchify, sincos_pos_embed, unpatchify

PARITY = Path(__file__).parent/'parity'
small = st.integers(1, 5)
few = settings(max_examples=60, deadline=None, derandomize=True)

def cut(images, p, q):
    "The definition, number by number"
    B,C,H,W = images.shape
    return torch.tensor([[[images[b,c,i+y,j+x].item() for y in range(p) for x in range(q) for c in range(C)]
                          for i in range(0,H,p) for j in range(0,W,q)] for b in range(B)], dtype=images.dtype)

@few
@given(small, small, small, small, small, small)
def test_round_trip(B, C, r, c, p, q):
    images = torch.arange(B*C*r*p*c*q).reshape(B, C, r*p, c*q)
    patches = patchify(images, (p,q))
    assert patches.shape==(B, r*c, p*q*C) and patch_grid(images.shape[2:], (p,q))==(r,c)
    assert torch.equal(patches, cut(images, p, q))
    assert torch.equal(unpatchify(patches, (p,q), grid=(r,c)), images)
    if r==c: assert torch.equal(unpatchify(patches, (p,q)), images)

def test_other_memory_layouts_and_gradients():
    images = torch.rand(2,3,8,12)
    assert torch.equal(patchify(images.to(memory_format=torch.channels_last), 4), patchify(images, 4))
    x = images.clone().requires_grad_()
    patchify(x, 4)[:,1].sum().backward()
    assert x.grad[:,:,:4,4:8].eq(1).all() and x.grad.sum()==2*48
    y = patchify(images, 4).transpose(0,1).contiguous().transpose(0,1)
    assert torch.equal(unpatchify(y, 4, (2,3)), images)

@pytest.mark.parametrize('size,p,C', [((28,28),(4,4),1), ((32,48),(8,16),3)])
def test_linear_on_patches_is_a_convolution(size, p, C):
    embed,x = PatchEmbed(size, p, C, 24), torch.rand(2, C, *size)
    y = patchify(x, p)@embed.proj.weight.permute(2,3,1,0).flatten(0,2) + embed.proj.bias
    torch.testing.assert_close(y, embed(x), rtol=1e-5, atol=1e-5)

@few
@given(st.integers(1,3), st.integers(1,9), st.integers(2,60), st.floats(0, 100), st.integers(0,99))
def test_normalize(B, L, D, scale, seed):
    x = scale*torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z,mean,std = normalize_patches(x)
    mae = (x-x.mean(-1,keepdim=True))/(x.var(-1,keepdim=True)+1e-6)**.5
    torch.testing.assert_close(z, mae); assert mean.shape==std.shape==(B,L,1)
    torch.testing.assert_close(denormalize_patches(z, mean, std), x)

def test_normalize_flat_patches():
    z,mean,std = normalize_patches(torch.full((2,3,16), .7))
    assert z.abs().max()<1e-3 and z.isfinite().all()
    x = torch.rand(1,2,8, requires_grad=True); normalize_patches(x*0+.5)[0].sum().backward(); assert x.grad.isfinite().all()

def test_sincos_equals_the_published_tables():
    for k,t in load_file(PARITY/'sincos.safetensors').items():
        cls = k.startswith('mae.')
        assert torch.equal(sincos_pos_embed(t.shape[2], round((t.shape[1]-cls)**.5), prefix=cls), t[0]), k

@few
@given(st.integers(1,16), st.integers(1,9), st.integers(1,9), st.integers(0,2))
def test_sincos(quarter, r, c, prefix):
    dim = 4*quarter; pos = sincos_pos_embed(dim, (r,c), prefix)
    assert pos.shape==(prefix+r*c, dim) and pos.dtype==torch.float32 and pos[:prefix].eq(0).all()
    g = pos[prefix:].reshape(r, c, dim)
    assert torch.equal(g[...,:dim//2], g[:1,:,:dim//2].expand(r,c,-1)) and torch.equal(g[...,dim//2:], g[:,:1,dim//2:].expand(r,c,-1))
    torch.testing.assert_close(g.pow(2).sum(-1), torch.full((r,c), dim/2))
    assert torch.unique(g.reshape(r*c, dim), dim=0).shape[0]==r*c

@pytest.mark.parametrize('f,msg', [
    (lambda: patch_grid(30, 7), 'resize the image to 28 or 35'),
    (lambda: patch_grid((32,30), 8), 'width 30 is not a multiple'),
    (lambda: patch_grid(8, 16), 'at most 8'),
    (lambda: patch_grid(8, 0), 'at least 1 pixel'),
    (lambda: patchify(torch.rand(1,28,28), 4), r'image\[None\]'),
    (lambda: patchify(torch.rand(1,1,28,28), 5), 'not a multiple'),
    (lambda: unpatchify(torch.rand(1,6,16), 4), 'does not hold 6'),
    (lambda: unpatchify(torch.rand(1,6,16), 4, grid=(2,2)), 'does not hold 6'),
    (lambda: unpatchify(torch.rand(1,4,16), 3), 'no multiple of 9'),
    (lambda: unpatchify(torch.rand(4,16), 4), r'\(B, L'),
    (lambda: normalize_patches(torch.ones(1,4,16, dtype=torch.uint8)), 'must be float'),
    (lambda: normalize_patches(torch.rand(1,4,1)), 'single number'),
    (lambda: sincos_pos_embed(30, 4), 'choose 28 or 32'),
    (lambda: sincos_pos_embed(2, 4), 'choose 4 or 8')])
def test_errors(f, msg):
    with pytest.raises(ValueError, match=msg): f()
