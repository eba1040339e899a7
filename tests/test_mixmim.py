"MixMIM against the authors' numbers; its encoder as a timm model; and that mixed images stay apart"
import json, subprocess, sys
from pathlib import Path
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from mim_nb.checkpoints import load_official, official_name, save_encoder
from mim_nb.evaluate import features, load_encoder
from mim_nb.mim import leak
import mim_nb.timm_models
from mim_nb.mixmim import MixMIM, mixed_attention, stage_masks
from mim_nb.mixmim_encoder import stage_grids, stage_windows
from mim_nb.methods import create
from mim_nb.pretrain import mim_pretrain

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
    with torch.no_grad(): cells = m.as_mask(MASK); z = m.encode(X, cells); both = torch.cat(m.decode_both(z, cells))
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
    assert torch.equal(authors, MASK) and m.sample_mask().partner.sum()==k

def test_every_weight_matters(ref):
    m,out = ref
    for n,p in m.named_parameters():
        if n.startswith('encoder.head'): continue
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(X, MASK).pred, out.pred)
            p.copy_(old)
        assert moved, n

@pytest.mark.parametrize('preset', ['base', 'large', 'huge'])
def test_full_size(preset):
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
    preset = dict(MixMIM.presets['base'], num_heads=[4,8,16,32], window=None)
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

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(1,4), (4,9), (2,16)]), st.integers(1, 3), st.floats(0, 1))
def test_images_in_a_window_get_what_each_would_get_alone(seed, size, heads, ratio):
    "Any windows and any mask, also one that gives a window to one image: attention over a group equals attention over its tokens alone"
    torch.manual_seed(seed)
    (W,N),side = size,int(size[1]**.5)
    block = timm.models.swin_transformer.SwinTransformerBlock(8*heads, (side,side), heads, window_size=side)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x,group = torch.randn(3,W,N,8*heads),torch.rand(W,N)<ratio
    got,bias = mixed_attention(block.attn, x, group),block.attn._get_rel_pos_bias()[0]
    for w in range(W):
        for g in (group[w], ~group[w]):
            q,k,v = block.attn.qkv(x[:,w,g]).unflatten(-1, (3,heads,-1)).permute(2,0,3,1,4)
            z = (q @ k.mT * block.attn.scale + bias[:,g][:,:,g]).softmax(-1) @ v
            torch.testing.assert_close(got[:,w,g], block.attn.proj(z.transpose(1,2).flatten(2)), atol=1e-5, rtol=1e-5)

def test_nothing_mixed_is_the_encoder_itself():
    m = MixMIM(**MixMIM.presets['tiny']).eval(); x = torch.randn(2,1,28,28)
    plain = m.encoder.forward_features(x)
    assert plain.shape==(2,7,7,96)
    torch.testing.assert_close(m.encode(x, m.as_mask(torch.zeros(49, dtype=torch.bool))).view_as(plain), plain)
    torch.testing.assert_close(m.encode(x, m.as_mask(torch.ones(49, dtype=torch.bool))).view_as(plain), plain.flip(0))

def test_the_partner_is_the_other_end_of_the_batch():
    "Exchanging the images of all pairs and inverting the mask gives the same mixtures, and so the same predictions"
    torch.manual_seed(0)
    m = MixMIM(**TINY).eval(); x = torch.rand(4,1,16,16); mask = m.sample_mask().partner
    a,b = m(x, mask),m(x.flip(0), ~mask)
    torch.testing.assert_close(a.pred, b.pred.flip(0)); torch.testing.assert_close(a.loss, b.loss)
    others = x.clone(); others[[0,3]] = torch.rand(2,1,16,16)
    torch.testing.assert_close(m(others, mask).pred[[1,2]], a.pred[[1,2]])                 # pairs know nothing of each other

def test_mask_is_drawn_from_the_generator_and_hides_as_much_as_asked():
    m = MixMIM(**MixMIM.presets['tiny'])
    a,b = (m.sample_mask(64, torch.Generator().manual_seed(5)).partner for _ in range(2))
    assert torch.equal(a, b) and a.shape==(49,) and a.dtype==torch.bool and a.sum()==24
    assert [MixMIM(**MixMIM.presets['tiny'] | dict(mask_ratio=r)).sample_mask().partner.sum().item() for r in (.25,.75)]==[12,36]

def test_grids_and_windows():
    for size,patch,n in ((224,4,4), (384,4,4), (28,2,2), (28,1,3), (32,1,4), ((64,96),4,4)):
        grids = stage_grids(size, patch, n); windows = stage_windows(grids)
        assert len(grids)==n and all(a==2*b for g,h in zip(grids, grids[1:]) for a,b in zip(g,h))
        assert all(g%w==0 for grid,window in zip(grids, windows) for g,w in zip(grid,window)) and windows[-1]==grids[-1]

@pytest.mark.parametrize('kw,message', [(dict(img_size=30, patch_size=4), 'whole cells: 2 stages over patches of 4x4 make cells of 8x8 pixels; resize the image to 32x32'),
    (dict(img_size=3), 'whole cells'), (dict(window=5), 'windows of 5x5 do not tile'), (dict(window=(7,)), '1 windows were given for 2 stages'), (dict(window=0), 'window must be a whole number of at least 1'),
    (dict(num_heads=(5,3)), 'cannot be cut into 5 heads'), (dict(num_heads=(1,1,1)), '3 numbers of heads'), (dict(depths=(1,0)), 'depths must be a whole number of at least 1'),
    (dict(mask_ratio=.01), 'takes 0 of 49 cells'), (dict(mask_ratio=1.5), 'mask_ratio must be'), (dict(mask_ratio=0), 'mask_ratio must be'), (dict(img_size=4), 'takes 0 of 1 cells'), (dict(drop_path=1.), 'drop_path must be')])
def test_what_does_not_fit(kw, message):
    with pytest.raises(ValueError, match=message): MixMIM(**{**MixMIM.presets['tiny'], **kw})

def test_batches_and_masks_that_do_not_fit():
    m = MixMIM(**TINY)
    for n in (1,3):
        with pytest.raises(ValueError, match=f'in pairs, and {n} cannot be paired'): m(torch.rand(n,1,16,16))
    for mask in (torch.zeros(15, dtype=torch.bool), torch.zeros(2,16, dtype=torch.bool), torch.zeros(16)):
        with pytest.raises(ValueError, match='one entry for each of the 16 cells'): m(torch.rand(2,1,16,16), mask)
    with pytest.raises(ValueError, match='images of shape'): m(torch.rand(2,1,28,28))

def small(name='mixmim_base', **kw): return timm.create_model(name, **{**dict(embed_dim=16, depths=(1,1,2,1), img_size=64), **kw}).eval()

def test_timm_model():
    m,x = small(num_classes=10),torch.rand(2,3,64,64)
    assert m(x).shape==(2,10) and m.forward_features(x).shape==(2,2,2,128) and m.pretrained_cfg['classifier']=='head.fc'
    final,stages = m.forward_intermediates(x, norm=True)
    assert [tuple(z.shape[1:]) for z in stages]==[(16,16,16), (32,8,8), (64,4,4), (128,2,2)] and torch.equal(final.permute(0,3,1,2), stages[-1])
    early, = m.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early, stages[1])
    f = small(features_only=True, out_indices=(1,2))
    assert [z.shape[1] for z in f(x)]==f.feature_info.channels()==[32,64] and f.feature_info.reduction()==[8,16]
    m.reset_classifier(3); assert m.get_classifier().out_features==3 and m(x).shape==(2,3)
    m.reset_classifier(0, ''); assert m(x).shape==(2,2,2,128)
    with pytest.raises(ValueError, match='output_fmt'): m.forward_intermediates(x, output_fmt='NLC')
    m.train().set_grad_checkpointing(); m(x).sum().backward()

def test_layer_decay():
    m = small(num_classes=10); groups = param_groups_layer_decay(m, .05, m.no_weight_decay(), layer_decay=.5)
    assert sorted({g['lr_scale'] for g in groups})==[.5**i for i in range(6,-1,-1)]
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}; decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    named = dict(m.named_parameters())
    assert id(m.pos_embed) not in scale and not m.pos_embed.requires_grad
    assert scale[id(named['patch_embed.proj.weight'])]==.5**6 < scale[id(named['layers.0.blocks.0.mlp.fc1.weight'])] < scale[id(named['layers.1.downsample.reduction.weight'])] < scale[id(named['head.fc.weight'])]
    assert decay[id(named['layers.2.blocks.0.attn.relative_position_bias_table'])]==0

def test_other_image_sizes():
    for size in (128, (64,96)):
        m = small(); m.set_input_size(size); h,w = timm.layers.to_2tuple(size)
        assert m.grids[0]==(h//4,w//4) and m(torch.rand(1,3,h,w)).shape==(1,1000)
        assert [b.attn.window_size for s in m.layers for b in s.blocks][::4]==[m.windows[0], m.windows[-1]]
    a,b = small(),small(); b.set_input_size(128); b.set_input_size(64)
    x = torch.rand(1,3,64,64)
    assert (a.pos_embed-b.pos_embed).abs().max()<.2
    with pytest.raises(ValueError, match='whole cells'): a.set_input_size(100)
    assert a(x).shape==(1,1000) and a.grids[0]==(16,16)                                     # a refused size changes nothing

def test_saved_encoder_comes_back_also_at_another_size(tmp_path):
    m = create('mixmim'); x = torch.rand(2,1,28,28)
    save_encoder(m, tmp_path/'e')
    home = load_encoder(tmp_path/'e')
    assert torch.equal(home.forward_features(m.normalize(x)), m.eval().encoder.forward_features(m.normalize(x)))
    torch.testing.assert_close(features(home, x), features(m, x))
    larger = timm.create_model(f"local-dir:{tmp_path/'e'}", pretrained=True, img_size=56, window_size=14, num_classes=4)
    assert larger.grids==[(28,28),(14,14)] and larger(torch.rand(1,1,56,56)).shape==(1,4)
    w = lambda e: e.layers[0].blocks[0]
    assert torch.equal(w(larger).mlp.fc1.weight, w(home).mlp.fc1.weight) and w(larger).attn.relative_position_bias_table.shape==(27*27,2)
    torch.testing.assert_close(larger.pos_embed.view(28,28,-1)[::2,::2].mean(), home.pos_embed.mean(), atol=.05, rtol=0)

def test_timm_knows_the_encoder_once_it_is_registered():
    "No import hook: `find_spec` used to spend it, and the model was unknown"
    code = """import sys, importlib.util, mim_nb
assert 'torch' not in sys.modules and 'timm' not in sys.modules and not any('mim_nb' in type(f).__module__ for f in sys.meta_path)
importlib.util.find_spec('timm')
import mim_nb.timm_models, timm
assert timm.is_model('mixmim_huge') and 'mim_nb.mixmim' not in sys.modules and len(timm.list_models('mixmim*'))==3"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)
    assert timm.get_pretrained_cfg('mixmim_large').input_size==(3,224,224)

def test_pictures():
    m = MixMIM(**TINY); x = torch.rand(4,1,16,16); mask = m.sample_mask()
    rows = m.pictures(x, mask)
    assert len(rows)==4 and all(r.shape==x.shape for r in rows.values())
    mixed = m.mix(x, mask); torch.testing.assert_close(mixed+mixed.flip(0), x+x.flip(0))
    perfect = m.to_images(m.target(x), x, torch.ones(16, dtype=torch.bool)); torch.testing.assert_close(perfect, x, atol=1e-5, rtol=0)

def test_bfloat16(ref):
    m,out = ref
    with torch.autocast('cpu', torch.bfloat16): loss = m(X, MASK).loss
    assert abs(loss-out.loss)<.05

def test_recipes():
    assert set(MixMIM.presets)==set(MixMIM.recipes)=={'tiny','small','base','large','huge'}
    r = MixMIM.recipes['base']
    assert (r['epochs'], r['warmup_epochs'], r['batch_size'], r['betas'])==(600, 40, 2048, (.9,.95)) and abs(r['lr']-1.2e-3)<1e-12
    assert all(r['batch_size']%2==0 for r in MixMIM.recipes.values())

def test_pretraining_command(tmp_path):
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(24): Image.fromarray(torch.randint(256, (32,32), dtype=torch.uint8).numpy()).save(photos/f'{i}.png')
    kw = dict(method='mixmim', data=str(photos), epochs=1, device='cpu', workers=0)
    mim_pretrain(out=tmp_path/'run', batch=8, **kw)
    assert {'encoder', 'metrics.json', 'reconstructions.png', 'log.jsonl', 'last.ckpt'} <= {f.name for f in (tmp_path/'run').iterdir()}
    assert load_encoder(tmp_path/'run').num_features==96
    with pytest.raises(ValueError, match='an even number of images'): mim_pretrain(out=tmp_path/'odd', batch=7, **kw)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m,out = run('cuda')
    a,b = FIX['out/x_rec'].chunk(2)
    assert close(out.pred.cpu(), torch.where(MASK[:,None], a, b.flip(0)))
    for n,g in GRADS.items(): assert close(grad(m, n), g), n
    with torch.autocast('cuda', torch.bfloat16): assert m(X.cuda(), MASK.cuda()).loss.isfinite()
