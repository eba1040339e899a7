"Pictures of other encoders than the notebooks', what must be left as it was, runs from elsewhere, and the command"
import json, os, shutil, subprocess, sys
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from mim_nb import attention_heads as heads
from mim_nb.attention_heads import *
from mim_nb.beit import BEiT
from mim_nb.exports import save_encoder
from mim_nb.images import ImageSet
from mim_nb.mae import MAE
from mim_nb.methods import create, methods
from mim_nb.pictures import *
from mim_nb.runfolder import run_settings
from mim_nb.runconfig import write_config
from mim_nb.runs import save_ckpt
from mim_nb.tokenizers import DVAE, save_tokenizer
from mim_nb.visualize import Run, figures, mim_show, save_figure

X = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
PNG = b'\x89PNG\r\n\x1a\n'

@pytest.fixture(autouse=True)
def close(): yield; plt.close('all')

@pytest.fixture(scope='module')
def m(): torch.manual_seed(0); return BEiT(**BEiT.presets['tiny'], tokenizer=DVAE()).eval()

@pytest.fixture(scope='module')
def run(m, tmp_path_factory):
    "A run folder as `mim_pretrain` leaves it, without the training"
    out = tmp_path_factory.mktemp('runs')/'beit'
    write_config(out, run_settings('beit', data='fashion_mnist', seed=0))
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
    assert [f.name for f in files]==[f.file for f in figures.values()]
    assert all(f.read_bytes()[:8]==b'\x89PNG\r\n\x1a\n' for f in files) and not list(run.glob('.mim_nb-*'))
    assert not plt.get_fignums()

def test_a_figure_that_fails_leaves_the_old_one(run, monkeypatch):
    (run/'curves.png').write_bytes(PNG+b'old')
    def full(path, write): raise OSError(28, 'could not write')
    monkeypatch.setattr('mim_nb.visualize.write_whole', full)
    with pytest.raises(OSError): mim_show(str(run), what='curves', device='cpu')
    assert (run/'curves.png').read_bytes()==PNG+b'old' and not plt.get_fignums()

def show(*argv):
    code = "import sys; from mim_nb.visualize import mim_show_cli; sys.exit(mim_show_cli())"
    return subprocess.run([sys.executable, '-c', code, *map(str, argv), '--device', 'cpu'], capture_output=True, text=True, timeout=120, env=None)

def test_the_command(run):
    r = show(run, '--what', 'curves,attention')
    assert r.returncode==0 and 'curves.png' in r.stdout and 'attention.png' in r.stdout, r.stderr

def test_one_sentence_for_what_is_missing(run, tmp_path):
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

# Images of any shape and number of channels
WIDE = torch.rand(4, 1, 16, 32, generator=torch.Generator().manual_seed(0))

def one_of(method, **kw):
    "A small untrained method of any shape"
    torch.manual_seed(0)
    if method=='mixmim': kw['window'] = None
    m = create(method, **kw)
    if hasattr(m, 'set_tokenizer'): m.set_tokenizer(DVAE(kw['img_size'], kw['patch_size'], kw.get('in_chans', 1), m.head.out_features))
    return m.eval()

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('patch', [4, (4,8)])
def test_every_figure_of_images_that_are_no_squares(method, patch):
    if method in ('beit','mcbeit') and patch!=4: pytest.skip('our tokenizer has square patches')
    if method=='mixmim': patch = 2 if patch==4 else (2,4)
    m = one_of(method, img_size=(16,32), patch_size=patch)
    show_pictures(m, WIDE); show_pca(m, WIDE)
    show_attention(m, WIDE)
    w,grid,prefix = image_attention(m, WIDE)
    assert grid[0]*grid[1]+prefix==w.shape[-1]
    stats = attention_stats(m, WIDE)
    assert all(h.isfinite().all() for layer in stats.values() for h in layer)
    far = (m.grid[0]**2+m.grid[1]**2)**.5
    assert max(h.max() for h in stats['distance'])<=far if method!='mixmim' else True

def test_panels_have_the_shape_of_the_images():
    m = MAE(img_size=(16,32), patch_size=(4,16), depth=2).eval()
    fig = plt.figure()
    show_attention(m, WIDE, fig=fig)
    image,head = fig.axes[:2]
    for ax in (image, head):
        height,width = (abs(a-b) for a,b in (ax.get_ylim(), ax.get_xlim()))
        assert height*ax.get_aspect()/width==16/32

def test_windows_that_are_no_squares():
    "32 tokens may be 4 rows of 8 or 8 rows of 4: the attention's module knows"
    swin = timm.create_model('swin_tiny_patch4_window7_224', img_size=(32,64), window_size=(4,8), embed_dim=24, depths=(2,2), num_heads=(2,4))
    s = attention_stats(swin, torch.rand(2,3,32,64))
    assert max(h.max() for h in s['distance'])<=(3**2+7**2)**.5
    assert token_grid(swin, 32, swin.layers[0].blocks[0].attn)==((4,8),0)

def test_the_fallback_is_a_sentence():
    with pytest.raises(ValueError, match='neither the patches of an image nor those of a window'): token_grid(timm.create_model('swin_tiny_patch4_window7_224'), 50)

@pytest.mark.parametrize('chans', [2, 4, 5])
def test_other_numbers_of_channels(chans, monkeypatch):
    "Two channels or five are drawn as their mean, in grey"
    m = MAE(img_size=16, patch_size=4, in_chans=chans, depth=2).eval()
    x = torch.rand(4, chans, 16, 16)
    show_pictures(m, x); show_attention(m, x); show_pca(m, x)
    pool = ImageSet(torch.randint(0, 256, (9,chans,16,16), dtype=torch.uint8))
    show_neighbours(m, pool.images[:2], pool, k=3)
    assert plt.gcf().axes[0].images[0].get_array().shape==(16,16)
    torch.testing.assert_close(drawable(x), x.mean(1, keepdim=True))

# Logs that were cut off or edited
def log(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder/'log.jsonl').write_bytes(b'\n'.join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return folder

def test_only_numbers_of_a_log_are_drawn(tmp_path):
    rows = log(tmp_path/'a', dict(step=1, epoch=.5, loss=2., words='many'), [1, 2], 'text', 7, None, b'{"step": 3, "epo', b'\xff\xfe',
               dict(step=2, loss=1.5), dict(step=3, epoch='two', loss=1.), dict(step=4, epoch=2., loss=[1], late=3.), dict(step=5, epoch=2.5, loss=float('nan')),
               dict(step=6, epoch=3., loss=True), dict(step=7, epoch=3.5, loss=.5))
    plot_curves(rows)
    loss,late = plt.gcf().axes
    assert loss.get_title()=='loss' and loss.lines[0].get_xdata().tolist()==[.5,3.5] and loss.lines[0].get_ydata().tolist()==[2.,.5]
    assert late.get_title()=='late' and late.lines[0].get_ydata().tolist()==[3.]

@pytest.mark.parametrize('rows,says', [((), 'has no log'), ((b'{"step',), 'has no log'), (([1],), 'has no log'), ((dict(step=1, epoch=.5, name='x'),), 'holds no numbers to draw')])
def test_logs_without_anything(tmp_path, rows, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: plot_curves(log(tmp_path/'b', *rows))
    assert '\n' not in str(e.value)

def test_a_log_with_a_thousand_names(tmp_path):
    plot_curves(log(tmp_path/'c', dict(step=1, epoch=1, **{f'k{i}': i for i in range(1000)})))
    assert len(plt.gcf().axes)<=24

# Runs from elsewhere
def copied(run, to, config=None, **changes):
    "A copy of a run's folder, its config.json edited"
    shutil.copytree(run, to)
    if config is None: config = json.loads((to/'config.json').read_text()) | changes
    (to/'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    return to

def sentence(f, *args, says=None, **kw):
    "What a call that must fail tells, which is one sentence"
    with pytest.raises((ValueError, OSError), match=says) as e: f(*args, device='cpu', **kw)
    assert '\n' not in str(e.value) and not plt.get_fignums()
    return str(e.value)

@pytest.mark.parametrize('config', ['', '[]', '{"method": 1}', 'null', '\xff', '{"method": "beit"', '{"method": "rm", "preset": "tiny", "data": "fashion_mnist", "seed": 0, "model": {}, "recipe": {}}'])
def test_a_description_that_describes_nothing(run, tmp_path, config): assert 'config.json' in sentence(mim_show, str(copied(run, tmp_path/'x', config)))

@pytest.mark.parametrize('changes', [dict(seed='x'), dict(model=[]), dict(model=dict(img_size=-28)), dict(model=dict(embed_dim='wide')), dict(model=dict(depth=10**9)), dict(recipe=3), dict(method=['beit'])])
def test_edited_descriptions(run, tmp_path, changes): sentence(mim_show, str(copied(run, tmp_path/'x', **changes)), what='pictures')

@pytest.mark.parametrize('data', ['wds/pipe:touch {}/executed', '/etc', 'https://example.org/{{0..9}}.tar'])
def test_images_that_a_foreign_description_names_are_not_loaded(run, tmp_path, data):
    folder = copied(run, tmp_path/'x', data=data.format(tmp_path))
    sentence(mim_show, str(folder), what='neighbours', says='repeat it with --data if you trust it')
    assert not (tmp_path/'executed').exists()
    assert len(Run(folder, 'cpu', data='fashion_mnist').data)==2000

def test_a_teacher_that_a_foreign_description_names_is_not_loaded(run, tmp_path):
    folder = copied(run, tmp_path/'x', method='deepmim', model=dict(teacher=str(tmp_path)))
    sentence(mim_show, str(folder), what='pictures', says='repeat it with --teacher if you trust it')

def checkpoint(folder, weights):
    "A checkpoint with these weights in place of the run's"
    class Weights:
        def state_dict(self): return weights
    for f in folder.glob('*.ckpt'): f.unlink()
    save_ckpt(folder, 20, Weights(), torch.optim.SGD([torch.zeros(1)], .1), {})
    return folder

@pytest.mark.parametrize('weights,says', [({}, 'holds another network'), ({'a': 3}, 'holds another network'), ({'mask_token': 'x'}, 'holds another network'), (None, 'not finite'), (7, 'no checkpoint in')])
def test_checkpoints_of_the_wrong_kind(run, m, tmp_path, weights, says):
    if weights is None: weights = {k: v/0 if v.is_floating_point() else v for k,v in m.state_dict().items()}
    folder = checkpoint(copied(run, tmp_path/'x'), weights)
    before = sorted(p.name for p in folder.iterdir())
    assert says in sentence(mim_show, str(folder), what='curves,pictures')
    assert sorted(p.name for p in folder.iterdir())==before

def test_a_pickle_beside_the_encoder_is_refused(run, tmp_path):
    folder = copied(run, tmp_path/'x')
    torch.save({}, folder/'encoder'/'pytorch_model.bin')
    assert 'pytorch_model.bin' in sentence(mim_show, str(folder), what='attention')

def test_a_damaged_encoder_is_refused(run, tmp_path):
    folder = copied(run, tmp_path/'x')
    file = folder/'encoder'/'model.safetensors'
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert 'damaged' in sentence(mim_show, str(folder), what='attention')

def test_a_single_image_has_no_neighbours(run, tmp_path):
    from PIL import Image
    data = tmp_path/'images'/'test'
    for split in ('train','test'):
        (tmp_path/'images'/split/'a').mkdir(parents=True)
        Image.new('L', (28,28), 90).save(tmp_path/'images'/split/'a'/'1.png')
    sentence(mim_show, str(run), what='neighbours', data=str(tmp_path/'images'), says='a single test image has no neighbours')

def test_mixmim_shows_an_even_number_of_images(tmp_path):
    from mim_nb.visualize import _draw_pictures
    m = one_of('mixmim', img_size=32, patch_size=4)
    class Few:
        device,method = torch.device('cpu'),m
        def __init__(self, n): self.n = n
        def images(self, n): return torch.rand(min(n, self.n), 1, 32, 32)
    for n in (1, 3): _draw_pictures(Few(n), (), None, plt.figure())

@pytest.mark.parametrize('method', ['mae', 'mixmim'])
def test_all_figures_of_a_run_on_images_that_are_no_squares(method, tmp_path):
    m = one_of(method, img_size=(16,32), patch_size=2 if method=='mixmim' else (4,8))
    model = dict(img_size=[16,32], patch_size=2, window=None) if method=='mixmim' else dict(img_size=[16,32], patch_size=[4,8])
    write_config(tmp_path, run_settings(method, data='fashion_mnist', seed=0, model=model) | dict(model=dict(type(m).presets['tiny'], **model)))
    save_encoder(m, tmp_path/'encoder')
    save_ckpt(tmp_path, 20, m, torch.optim.AdamW(m.parameters()), {})
    log(tmp_path, dict(step=10, epoch=1., loss=1.))
    assert Run(tmp_path, 'cpu').images(3).shape==(3,1,16,32)
    assert len(mim_show(str(tmp_path), device='cpu'))==6

# What mim_show writes, and what it leaves
def test_foreign_files_stay(run, tmp_path):
    folder = copied(run, tmp_path/'x')
    (folder/'curves.png').unlink(missing_ok=True)
    (folder/'curves.png').write_text('my notes')
    assert 'no PNG' in sentence(mim_show, str(folder))
    assert (folder/'curves.png').read_text()=='my notes'

def test_links_and_folders_stay(run, tmp_path):
    folder,photo = copied(run, tmp_path/'x'),tmp_path/'photo.png'
    photo.write_bytes(PNG)
    (folder/'curves.png').unlink(missing_ok=True)
    (folder/'curves.png').symlink_to(photo)
    sentence(mim_show, str(folder), what='curves', says='is a link or a folder')
    assert photo.read_bytes()==PNG
    (folder/'curves.png').unlink()
    (folder/'curves.png').mkdir()
    sentence(mim_show, str(folder), what='curves', says='is a link or a folder')

@pytest.mark.parametrize('kw,says', [(dict(layer=0), 'layer must be a whole number of at least 1'), (dict(layer=-1), 'layer must be'), (dict(layer=99), 'between 1 and 4'), (dict(layer=99, what='neighbours'), 'between 1 and 4'),
    (dict(what='atention'), "did you mean 'attention'"), (dict(what=''), 'unknown figure'), (dict(what='curves,'), 'unknown figure'), (dict(compare='nowhere'), 'nowhere holds no run'), (dict(compare=''), 'run is an empty text'),
    (dict(compare='{run},'), 'run is an empty text'), (dict(data=''), 'data is an empty text'), (dict(data='no_such_set', what='features'), 'no_such_set')])
def test_nothing_is_drawn_before_everything_is_checked(run, tmp_path, monkeypatch, kw, says):
    monkeypatch.setattr('mim_nb.visualize.write_whole', lambda *a: pytest.fail('a figure was written'))
    kw = {k: v.format(run=run) if isinstance(v, str) else v for k,v in kw.items()}
    assert says in sentence(mim_show, str(run), **kw)

def test_an_empty_name_is_no_run(): assert 'run is an empty text' in sentence(mim_show, '')

def test_runs_that_take_other_images_are_not_compared(run, tmp_path):
    other = tmp_path/'other'
    torch.manual_seed(0)
    save_encoder(MAE(img_size=32, in_chans=3, patch_size=8, depth=1), other/'encoder')
    write_config(other, run_settings('mae', data='fashion_mnist', seed=0))
    assert 'cannot be drawn beside' in sentence(mim_show, str(run), what='statistics', compare=str(other))

def test_a_run_is_shown_while_it_goes_on(run, tmp_path):
    "A last row that is being written, no encoder yet, and a folder that another process holds"
    from mim_nb.files import lock
    folder = copied(run, tmp_path/'x')
    shutil.rmtree(folder/'encoder')
    with open(folder/'log.jsonl', 'a') as f: f.write('{"step": 30, "epo')
    with lock(folder): files = mim_show(str(folder), what='curves,pictures', device='cpu')
    assert [f.name for f in files]==['curves.png', 'reconstructions.png']

def test_a_reader_that_goes_away(run):
    "`mim_show RUN | head -0`: the figures are there"
    (run/'curves.png').unlink(missing_ok=True)
    code = "import sys; from mim_nb.visualize import mim_show_cli; sys.exit(mim_show_cli())"
    p = subprocess.Popen([sys.executable, '-c', code, str(run), '--what', 'curves', '--device', 'cpu'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(120)==0 and b'Traceback' not in err and (run/'curves.png').exists(), err
