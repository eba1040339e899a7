"Encoders: sizes of all kinds, the first weights, the way to timm and back, parameter counts"
import json
from pathlib import Path
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from timm.models.vision_transformer import VisionTransformer
from mim_nb.beit import BEiT
from mim_nb.exports import save_encoder
from mim_nb.encoders import export_vit, sincos_vit, xavier_init
from mim_nb.mim import MIM
from mim_nb.patches import sincos_pos_embed

FULL = {k: json.loads((Path(__file__).parent/f'parity/fullsize_{k}.json').read_text()) for k in ('beit', 'mcbeit', 'mae', 'deepmim', 'saim', 'mixmim')}
def count(m, trained=False): return sum(p.numel() for p in m.parameters() if p.requires_grad or not trained)

@pytest.mark.parametrize('name', ['beit', 'mcbeit', 'mae', 'deepmim', 'saim'])
def test_full_size_has_the_authors_number_of_parameters(name):
    with torch.device('meta'): e = BEiT(**BEiT.presets['base']).encoder if 'beit' in name else sincos_vit(224, 16, 3, 768, 12)
    c = FULL[name]['counts']
    assert (count(e), count(e, trained=True))==(c['encoder_parameters'], c['encoder_trainable_parameters'])

@pytest.mark.parametrize('name', ['mae', 'deepmim'])
def test_full_size_has_the_authors_names_and_shapes(name):
    with torch.device('meta'): ours = {n: list(p.shape) for n,p in sincos_vit(224, 16, 3, 768, 12).named_parameters()}
    theirs = FULL[name]['state_dict']
    assert {n: theirs.get(n) for n in ours}==ours

@settings(max_examples=12, deadline=None)
@given(side=st.integers(1, 6), patch=st.integers(2, 6), chans=st.sampled_from([1, 3]), heads=st.integers(1, 4), depth=st.integers(1, 3), drop=st.sampled_from([0., .3]))
def test_any_size(side, patch, chans, heads, depth, drop):
    e = sincos_vit(side*patch, patch, chans, 12*heads, depth, heads, drop).eval()
    x = torch.rand(2, chans, side*patch, side*patch)
    assert e.forward_features(x).shape==(2, 1+side**2, 12*heads) and len(e.blocks)==depth
    assert torch.equal(e.pos_embed[0], sincos_pos_embed(12*heads, side, prefix=1))
    home,_,args = export_vit(e)
    assert torch.equal(home(x), e(x)) and not home.training and isinstance(home, VisionTransformer)

@pytest.mark.parametrize('kw,says', [(dict(img_size=30), 'not a multiple of the patch height 4'), (dict(patch_size=0), 'patch_size must be a whole number of at least 1'),
    (dict(embed_dim=96, num_heads=5), 'a width of 96 cannot be cut into 5 heads'), (dict(embed_dim=30, num_heads=3), 'multiple of 4'),
    (dict(depth=0), 'depth must be a whole number of at least 1'), (dict(drop_path=1.), 'drop_path must be a number of at least 0 and less than 1, got 1.0'), (dict(drop_path=-.1), 'got -0.1')])
def test_bad_sizes(kw, says):
    with pytest.raises(ValueError, match=says) as e: sincos_vit(**kw)
    assert '\n' not in str(e.value)

def test_positions_stay_fixed_in_training():
    e = sincos_vit()
    e(torch.rand(2,1,28,28)).sum().backward()
    assert e.pos_embed.grad is None and all(p.grad is not None for n,p in e.named_parameters() if n not in ('pos_embed',))

def test_xavier_init_covers_a_whole_method():
    "Weights of a decoder and `[M]` are set as well; norms are left alone"
    class WithDecoder(MIM):
        def __init__(self):
            super().__init__(sincos_vit())
            self.mask_token,self.decoder = torch.nn.Parameter(torch.zeros(1,1,96)),torch.nn.Linear(96, 16)
    torch.manual_seed(0)
    m = WithDecoder(); xavier_init(m)
    assert .01<m.mask_token.std()<.03 and .01<m.encoder.cls_token.std()<.03
    assert abs(m.decoder.weight.abs().max()-(6/112)**.5)<.01 and not m.decoder.bias.any()
    assert all((l.weight==1).all() and not l.bias.any() for l in m.modules() if isinstance(l, torch.nn.LayerNorm))
    assert torch.equal(m.encoder.pos_embed[0], sincos_pos_embed(96, 7, prefix=1))
    a,b = WithDecoder(),WithDecoder()
    for o in (a,b): torch.manual_seed(3); xavier_init(o)
    assert all(torch.equal(p, q) for (n,p),(_,q) in zip(a.named_parameters(), b.named_parameters()) if 'patch_embed.proj.bias' not in n)

@pytest.mark.parametrize('size,chans', [(28, 1), (32, 3)])
def test_home_and_back(tmp_path, size, chans):
    class Saved(MIM):
        def export_encoder(self): return export_vit(self.encoder)
    torch.manual_seed(0)
    e = sincos_vit(size, 4, chans, 48, 2, 3, drop_path=.1).eval(); xavier_init(e)
    save_encoder(Saved(e), tmp_path/'encoder')
    again = timm.create_model(f'local-dir:{tmp_path}/encoder', pretrained=True).eval()
    x = torch.randn(3, chans, size, size)
    torch.testing.assert_close(again.forward_features(x), e.forward_features(x))
    larger = timm.create_model(f'local-dir:{tmp_path}/encoder', pretrained=True, img_size=2*size, num_classes=7).eval()
    assert larger(torch.randn(1, chans, 2*size, 2*size)).shape==(1,7)
