"MixMIM against the authors' numbers; its encoder as a timm model; and that mixed images stay apart"
import json, subprocess, sys
from pathlib import Path
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from mim_nb.checkpoints import load_official, official_name, save_encoder
from mim_nb.data import load_data
from mim_nb.evaluate import features, load_encoder
from mim_nb.methods import methods
from mim_nb.mim import leak
from mim_nb.mixmim import MixMIM, MixMIMEncoder, group_windows, mixed_attention, mixed_block, stage_grids, stage_masks, stage_windows
from mim_nb.train import fit

methods.setdefault('mixmim', MixMIM)
PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'mixmim_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}
X,MASK = FIX['in/images'],FIX['out/mask_s4'].flatten().bool()
TINY = dict(img_size=16, patch_size=2, in_chans=1, embed_dim=16, depths=(1,1), decoder_dim=16, decoder_depth=1)

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def run(device='cpu'):
    m = load_official('mixmim', WEIGHTS, mean=0., std=1., decoder_heads=4).to(device)
    out = m(X.to(device), MASK.to(device)); out.loss.backward()
    return m,out

@pytest.fixture(scope='module')
def ref(): return run()

def grad(m, name): return dict(m.named_parameters())[official_name(MixMIM, name)].grad.cpu()

def test_masks_features_reconstructions_and_loss(ref):
    m,out = ref
    for i,s in enumerate(stage_masks(MASK, m.encoder.grids)): assert torch.equal(s.flatten(), FIX[f'out/mask_s{i+1}'].flatten().bool())
    with torch.no_grad(): z = m.encode(X, MASK); both = torch.cat(m.decode_both(z, MASK))
    assert close(z, FIX['out/z']) and close(both, FIX['out/x_rec'])
    a,b = FIX['out/x_rec'].chunk(2)
    assert close(out.pred, torch.where(MASK[:,None], a, b.flip(0)))
    loss = json.loads((PARITY/'mixmim_a.json').read_text())['scalars']['loss']
    assert abs(out.loss.item()-loss) <= 1e-5*loss

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(grad(ref[0], name), GRADS[name])

def test_mask_has_the_authors_count(ref):
    m,_ = ref
    k = int(m.num_patches*.5)
    authors = torch.zeros(4).scatter_(0, FIX['in/noise'].flatten().argsort()[:k], 1).bool()
    assert torch.equal(authors, MASK) and m.sample_mask().sum()==k

def test_every_weight_matters(ref):
    m,out = ref
    for n,p in m.named_parameters():
        if n.startswith('encoder.head'): continue
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(X, MASK).pred, out.pred)
            p.copy_(old)
        assert moved, n

@pytest.mark.parametrize('preset,million', [('base',88), ('large',None), ('huge',None)])
def test_full_size(preset, million):
    with torch.device('meta'): m = MixMIM(**MixMIM.presets[preset])
    assert m.grid==(7,7) and m.num_masked==24 and m.encoder.windows==[(14,14)]*3+[(7,7)]
    assert [s.blocks[0].attn.num_heads for s in m.encoder.layers]==[w//32 for w in (m.encoder.embed_dim*2**i for i in range(4))]
    assert all(l.eps==1e-5 for l in m.modules() if isinstance(l, torch.nn.LayerNorm))
    if preset!='base': return
    full = json.loads((PARITY/'fullsize_mixmim.json').read_text())
    theirs = {ours: s for k,s in full['state_dict'].items() if (ours := official_name(MixMIM, k))}
    assert {n: list(p.shape) for n,p in m.named_parameters()}==theirs
    count = lambda ps: sum(p.numel() for p in ps)
    assert count(m.encoder.parameters())==full['counts']['encoder_parameters']
    assert count(p for p in m.parameters() if p.requires_grad)==full['counts']['trainable_parameters']
    sizes = MixMIM.official_sizes({ours: torch.empty(s, device='meta') for k,s in full['state_dict'].items() if (ours := official_name(MixMIM, k))})
    preset = dict(MixMIM.presets['base'], num_heads=[4,8,16,32], window=[14,14,14,7])
    assert {k: list(v) if isinstance(v, tuple) else v for k,v in preset.items()}==sizes

@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(16,2,1,(1,1),None), (28,2,1,(1,1),7), (32,2,3,(1,1,1),(8,4,4)), (32,1,1,(1,1,1,1),8)]))
def test_nothing_leaks(seed, size):
    "No cell's prediction depends on that cell's own pixels: in all images, so in both of every pair"
    torch.manual_seed(seed)
    s,p,c,depths,window = size
    m = MixMIM(s, p, c, 16, depths, num_heads=[1]*len(depths), window=window, decoder_dim=16, decoder_depth=1)
    for n,q in m.named_parameters():
        if n.endswith('bias_table'): torch.nn.init.normal_(q)
    own,other = leak(m, torch.rand(2,c,s,s))
    assert own==0 and other>0
