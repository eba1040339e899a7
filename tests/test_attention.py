"What the notebook can't show of attention: ranges of shapes, timm's blocks in training, a causal pass through a whole encoder"
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from mim_nb.attention import attend, attention_weights, causal_block, group_mask

@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 3), H=st.integers(1, 3), N=st.integers(1, 9), M=st.integers(1, 9), d=st.integers(1, 16), kind=st.sampled_from(['none', 'bool', 'float', 'scale', 'causal']), seed=st.integers(0, 2**20))
def test_weights_are_those_of_sdpa(B, H, N, M, d, kind, seed):
    torch.manual_seed(seed)
    if kind=='causal': M = N
    q,k,v = torch.randn(B,H,N,d),torch.randn(B,H,M,d),torch.randn(B,H,M,d)
    look = torch.rand(N,M)<.5; look[:,0] = True
    kw = dict(none={}, bool=dict(attn_mask=look), float=dict(attn_mask=torch.randn(H,N,M)), scale=dict(scale=.3), causal=dict(is_causal=True))[kind]
    w = attention_weights(q, k, **kw)
    torch.testing.assert_close(w @ v, F.scaled_dot_product_attention(q, k, v, **kw), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w.sum(-1), torch.ones(B,H,N))

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('qk_norm', [True, False])
def test_attend_equals_timm(bias, qk_norm):
    torch.manual_seed(0)
    a = Attention(48, 4, qkv_bias=bias, qk_norm=qk_norm, norm_layer=torch.nn.LayerNorm)
    x,c = torch.randn(2,7,48),torch.randn(2,11,48)
    torch.testing.assert_close(attend(a, x, x), a(x), atol=1e-6, rtol=1e-5)
    q,_,_ = a.qkv(x).chunk(3, -1); _,k,v = a.qkv(c).chunk(3, -1)
    q,k,v = (o.unflatten(-1, (4,12)).transpose(1,2) for o in (q,k,v))
    z = attention_weights(a.q_norm(q), a.k_norm(k)) @ v
    torch.testing.assert_close(attend(a, x, c), a.proj(z.transpose(1,2).flatten(2)), atol=1e-6, rtol=1e-5)

def test_attend_gives_the_gradients_of_timm():
    torch.manual_seed(0)
    a,x = Attention(48, 4, qkv_bias=True),torch.randn(2,7,48)
    grads = []
    for f in (lambda: a(x), lambda: attend(a, x, x)):
        a.zero_grad(); f().pow(2).sum().backward()
        grads.append([p.grad.clone() for p in a.parameters()])
    for g,h in zip(*grads): torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-4)

def test_dropout_only_in_training():
    torch.manual_seed(0)
    a,x = Attention(48, 4, attn_drop=.5),torch.randn(1,9,48)
    assert not torch.equal(attend(a, x, x), attend(a, x, x))
    a.eval()
    assert torch.equal(attend(a, x, x), attend(a, x, x))

@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([None, .1]))
def test_two_streams_through_an_encoder_are_the_masked_form(seed, scale):
    "Twelve blocks deep in idea, three here: content and query streams, sorted and causal, against masks in image order"
    torch.manual_seed(seed)
    e = VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=0, embed_dim=24, depth=3, num_heads=3, init_values=scale).eval()
    own = VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=0, embed_dim=24, depth=3, num_heads=3, init_values=scale).eval().blocks
    h0,g0,order = torch.randn(1,17,24),torch.randn(1,17,24),torch.randperm(16)
    turn = torch.cat([torch.zeros(1, dtype=torch.long), 1+order])
    rank = turn.argsort()
    content,query = rank[None]<=rank[:,None],(rank[None]<rank[:,None])[1:]
    def masked(block, x, c, m):
        x = x + block.ls1(attend(block.attn, block.norm1(x), block.norm1(c), m))
        return x + block.ls2(block.mlp(block.norm2(x)))
    h,g,hs,gs = h0,g0[:,1:],h0[:,turn],g0[:,turn][:,1:]
    for b,o in zip(e.blocks, own):
        h,hs = masked(b, h, h, content),causal_block(b, hs)
        g,gs = masked(o, g, h, query),causal_block(o, gs, hs[:,:-1])
    torch.testing.assert_close(hs[:,rank], h, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gs[:,rank[1:]-1], g, atol=2e-6, rtol=1e-5)

@settings(max_examples=10, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**20))
def test_causal_block_never_looks_ahead(n, seed):
    torch.manual_seed(seed)
    b,x = Block(24, 3, qkv_bias=True, drop_path=.5).eval(),torch.randn(1, n, 24)
    i = int(torch.randint(n-1, ()))
    y = x.clone(); y[:,i+1:] += torch.randn(1, n-i-1, 24)
    assert torch.equal(causal_block(b, x)[:,:i+1], causal_block(b, y)[:,:i+1]) or torch.allclose(causal_block(b, x)[:,:i+1], causal_block(b, y)[:,:i+1], atol=1e-6)

@pytest.mark.parametrize('n', [1, 5, 9])
def test_causal_block_refuses_another_number_of_tokens(n):
    with pytest.raises(ValueError, match=rf'as many context tokens as queries, got {n} and 8: pass'): causal_block(Block(24, 3), torch.randn(1,8,24), torch.randn(1,n,24))

@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), groups=st.integers(1, 4), seed=st.integers(0, 2**20), with_bias=st.booleans())
def test_groups_never_meet(n, groups, seed, with_bias):
    torch.manual_seed(seed)
    g = torch.randint(groups, (2,1,n))
    bias = torch.randn(3,n,n) if with_bias else None
    m = group_mask(g, bias)
    same = g[...,None]==g[...,None,:]
    w = attention_weights(*torch.randn(2,2,3,n,5), m)
    assert (w.masked_select(~same.expand_as(w))==0).all() and w.isfinite().all()
    if with_bias: assert torch.equal(m.masked_select(same.expand_as(m)), bias.expand_as(m).masked_select(same.expand_as(m)))
    else: assert m.dtype==torch.bool and torch.equal(m, same)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_causal_block_on_cuda():
    torch.manual_seed(0)
    b,x = Block(64, 2, qkv_bias=True).eval(),torch.randn(2,17,64)
    torch.testing.assert_close(causal_block(b.cuda(), x.cuda()).cpu(), causal_block(b.cpu(), x), atol=1e-4, rtol=1e-4)
