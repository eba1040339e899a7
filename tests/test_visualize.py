"Pictures of other encoders than the notebook's, what must be left as it was, and the command"
import json, subprocess, sys
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from mim_nb.beit import BEiT
from mim_nb.checkpoints import save_encoder
from mim_nb.pretrain import save_run, settings as run_settings
from mim_nb.tokenizers import DVAE, save_tokenizer
from mim_nb.train import save_ckpt, write_whole
from mim_nb.visualize import *
from mim_nb.visualize import figures

X = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))

@pytest.fixture(autouse=True)
def close(): yield; plt.close('all')

@pytest.fixture(scope='module')
def m(): torch.manual_seed(0); return BEiT(**BEiT.presets['tiny'], tokenizer=DVAE()).eval()

@pytest.fixture(scope='module')
def run(m, tmp_path_factory):
    "A run folder as `mim_pretrain` leaves it, without the training"
    out = tmp_path_factory.mktemp('runs')/'beit'
    save_run(out, run_settings('beit', data='fashion_mnist', seed=0))
    save_tokenizer(m.tokenizer, out/'tokenizer'); save_encoder(m, out/'encoder')
    save_ckpt(out, 20, m, torch.optim.AdamW(m.parameters()), {})
    log = [dict(step=10*i, epoch=i/2, lr=1e-3, loss=5.-i, accuracy=i/9, images_per_second=9.) for i in (1,2)]
    (out/'log.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in log))
    return out

@pytest.mark.parametrize('name,kw,shape', [
    ('vit_tiny_patch16_224', dict(img_size=64), (3, 17, 17)), ('vit_medium_patch16_gap_240', dict(img_size=64), (8, 16, 16)),
    ('deit3_small_patch16_224', dict(img_size=64), (6, 17, 17)), ('beit_base_patch16_224', dict(img_size=64, embed_dim=48, num_heads=4, depth=2), (4, 17, 17)),
    ('vit_small_patch14_reg4_dinov2', dict(img_size=56), (6, 21, 21)), ('eva02_tiny_patch14_224', dict(img_size=56), (3, 17, 17))])
def test_any_timm_transformer(name, kw, shape):
    torch.manual_seed(0)
    e,x = timm.create_model(name, num_classes=0, **kw),torch.rand(2, 3, kw['img_size'], kw['img_size'])
    w = attention_maps(e, x, layer=1)
    assert w.shape==(2, *shape) and e.training
    torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
    s = attention_stats(e, x)
    assert all(len(v)==len(e.blocks) and all(h.isfinite().all() for h in v) for v in s.values())
    p = feature_pca(e, x)
    assert p.shape==(2, 3, *e.patch_embed.grid_size) and 0<=p.min() and p.max()<=1
    show_attention(e, x, 1, query=0); show_pca(e, x)

@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 3), H=st.integers(1, 4), R=st.integers(1, 5), C=st.integers(1, 5), prefix=st.integers(0, 2), seed=st.integers(0, 2**20))
def test_ranges_of_the_three_numbers(B, H, R, C, prefix, seed):
    torch.manual_seed(seed)
    N = R*C+prefix
    w = (3*torch.randn(B,H,N,N)).softmax(-1)
    far = ((R-1)**2+(C-1)**2)**.5
    assert ((0<=attention_distance(w, (R,C), prefix)) & (attention_distance(w, (R,C), prefix)<=far+1e-4)).all()
    e = attention_entropy(w)
    assert ((e>=-1e-6) & (e<=torch.tensor(float(N)).log()+1e-4)).all()
    assert (attention_diversity(w)>=-1e-5).all() and attention_diversity(w).shape==(H,)

def test_the_model_is_left_as_it_was(m):
    before = {k: v.clone() for k,v in m.state_dict().items()}
    m.encoder.train(); m.encoder.blocks[1].attn.fused_attn = False
    attention_maps(m, X); attention_stats(m, X); feature_pca(m, X)
    assert m.encoder.training and [b.attn.fused_attn for b in m.encoder.blocks]==[True,False,True,True]
    m.encoder.blocks[1].attn.fused_attn = True; m.eval()
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and all(p.grad is None for p in m.parameters())
    with pytest.raises(ValueError): attention_maps(m, X, layer=9)
    assert not m.encoder.training

@pytest.mark.parametrize('f', [attention_maps, attention_stats, feature_pca, show_attention, show_pca, show_pictures])
@pytest.mark.parametrize('bad,says', [(torch.rand(2,3,28,28), r'got \(2, 3, 28, 28\)'), (torch.rand(2,1,32,28), r'got \(2, 1, 32, 28\)'),
    (torch.rand(1,28,28), r'got \(1, 28, 28\)'), (torch.zeros(2,1,28,28, dtype=torch.uint8), 'divide bytes by 255')])
def test_bad_images(m, f, bad, says):
    with pytest.raises(ValueError, match=says) as e: f(m, bad)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('f,what', [(attention_maps, 'attention layers'), (show_attention, 'attention layers'), (feature_pca, 'blocks'), (show_pca, 'blocks')])
@pytest.mark.parametrize('layer', [-1, 0, 5])
def test_a_layer_that_does_not_exist(m, f, what, layer):
    with pytest.raises(ValueError, match=f'between 1 and 4, the {what} of this encoder; got {layer}'): f(m, X, layer=layer)

def test_windows():
    "Distances count inside a window; a window that covers the image can be drawn"
    e,x = timm.create_model('swin_tiny_patch4_window7_224', img_size=56, window_size=7, embed_dim=24, depths=(2,2), num_heads=(2,4)),torch.rand(3,3,56,56)
    assert [len(h) for h in attention_stats(e, x)['distance']]==[2,2,4,4] and max(h.max() for h in attention_stats(e, x)['distance'])<=72**.5
    show_attention(e, x)
    with pytest.raises(ValueError, match='inside windows'): show_attention(e, x, layer=1)

def test_no_attention():
    with pytest.raises(ValueError, match='ResNet has no attention'): attention_stats(timm.create_model('resnet10t'), torch.rand(1,3,176,176))

def test_run_reads_what_is_there(run, m):
    r = Run(run, 'cpu')
    torch.testing.assert_close(r.method.encoder.forward_features(X), m.encoder.forward_features(X))
    torch.testing.assert_close(r.encoder.forward_features(X), m.encoder.forward_features(X))
    assert not r.method.training and r.images(5).shape==(5,1,28,28) and r.images(5).max()<=1

def test_mim_show_writes_whole_figures(run):
    files = mim_show(str(run), device='cpu')
    assert [f.name for f in files]==[v[0] for v in figures.values()]
    assert all(f.read_bytes()[:8]==b'\x89PNG\r\n\x1a\n' for f in files) and not list(run.glob('*.tmp'))
    assert not plt.get_fignums()

def test_a_figure_that_fails_leaves_the_old_one(run, monkeypatch):
    (run/'curves.png').write_bytes(b'old')
    def full(path, write): raise OSError(28, 'could not write')
    monkeypatch.setattr('mim_nb.visualize.write_whole', full)
    with pytest.raises(OSError): mim_show(str(run), what='curves', device='cpu')
    assert (run/'curves.png').read_bytes()==b'old' and not plt.get_fignums()

def show(*argv):
    code = "import sys; from mim_nb.visualize import mim_show_cli; sys.exit(mim_show_cli())"
    return subprocess.run([sys.executable, '-c', code, *map(str, argv), '--device', 'cpu'], capture_output=True, text=True, timeout=120, env=None)

def test_the_command(run):
    r = show(run, '--what', 'curves,attention')
    assert r.returncode==0 and 'curves.png' in r.stdout and 'attention.png' in r.stdout, r.stderr

def test_one_sentence_for_what_is_missing(run, tmp_path):
    import shutil
    def without(name, *missing):
        to = tmp_path/name; shutil.copytree(run, to)
        for o in missing: shutil.rmtree(to/o) if (to/o).is_dir() else (to/o).unlink()
        return str(to)
    cases = [(without('a', 'encoder'), dict(what='attention'), 'holds no encoder'), (without('b', 'log.jsonl'), dict(what='curves'), 'has no log'),
             (without('c', 'last.ckpt'), dict(what='pictures'), 'holds no checkpoint'), (without('d', 'config.json'), {}, 'holds no run'), ('nowhere', {}, 'holds no run'),
             (str(run), dict(compare='nowhere'), 'nowhere holds no run'), (str(run), dict(what='curve'), "unknown figure 'curve'"), (str(run), dict(what='features', layer=9), 'between 1 and 4')]
    for folder,kw,says in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=says) as e: mim_show(folder, device='cpu', **kw)
        assert '\n' not in str(e.value)
    mim_show(without('e', 'encoder', 'last.ckpt'), what='curves', device='cpu')
