"Folders of encoders and tokenizers: damaged, edited, dangerous and oblong ones"
import json, random, resource, shutil, time
from pathlib import Path
import pytest, timm, torch
from safetensors.torch import load_file, save_file
from mim_nb.checkpoints import load_official
from mim_nb.exports import save_encoder
from mim_nb.encoders import sincos_vit
from mim_nb.files import check_folder_sums
from mim_nb.folders import check_memory, encoder_folder, load_folder, on_meta, unknown_model
from mim_nb.methods import create, methods
from mim_nb.tokenizers import DVAE, load_tokenizer, save_tokenizer

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('saved')
    torch.manual_seed(0)
    for name in ('mae', 'beit', 'mixmim'): save_encoder(create(name), tmp/name)
    save_tokenizer(DVAE(width=16, vocab_size=32, depth=1), tmp/'tokenizer')
    return tmp

@pytest.fixture
def copy(saved, tmp_path):
    "A copy of a folder that may be spoilt; without its list of digests unless that is wanted"
    def make(name, sums=False, **changes):
        folder = Path(shutil.copytree(saved/name, tmp_path/f'{name}{len(list(tmp_path.iterdir()))}'))
        if not sums: (folder/'SHA256SUMS').unlink()
        config = json.loads((folder/'config.json').read_text())
        (folder/'config.json').write_text(json.dumps(config | changes)) if changes else None
        return folder
    return make

def sentence(load, folder, match=''):
    "Loading ends with one sentence, soon and without taking memory"
    start,before = time.perf_counter(),resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=match) as e: load(folder)
    assert type(e.value) in (ValueError, FileNotFoundError) and len(str(e.value).splitlines())==1 and len(str(e.value))>30
    assert time.perf_counter()-start<30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before < 300_000           # kB
    return str(e.value)

# Damage

@pytest.mark.parametrize('name,load', [('mae', load_folder), ('tokenizer', load_tokenizer)])
def test_every_flipped_bit_and_zeroed_page_is_noticed(saved, tmp_path, name, load):
    "1,000 bits and 100 pages, each file as often; the message names the file"
    rng,folder = random.Random(0),Path(shutil.copytree(saved/name, tmp_path/'x'))
    originals = {f: f.read_bytes() for f in sorted(folder.iterdir())}
    assert len(originals)==3
    for i in range(1100):
        f = list(originals)[i%3]
        data = bytearray(originals[f])
        at = rng.randrange(len(data))
        if f.name=='SHA256SUMS' and data[at]==10: at -= 1              # another line end in a list of digests means the same
        if i<1000: data[at] ^= 1<<rng.randrange(8)
        else:
            page = at//4096*4096
            data[page:page+4096] = bytes(len(data[page:page+4096]))
        f.write_bytes(data)
        with pytest.raises(ValueError) as e: check_folder_sums(folder) if i%50 else load(folder)
        assert f.name in str(e.value) or 'SHA256SUMS' in str(e.value), (i, f)
        f.write_bytes(originals[f])
    load(folder)

@pytest.mark.parametrize('name,load', [('mae', load_folder), ('tokenizer', load_tokenizer)])
@pytest.mark.parametrize('part', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('share', [0, .01, .5, .99])
def test_truncated_files(copy, name, load, part, share):
    "Also without the list of digests"
    folder = copy(name)
    data = (folder/part).read_bytes()
    (folder/part).write_bytes(data[:int(len(data)*share)])
    assert part in sentence(load, folder)

@pytest.mark.parametrize('name,load', [('mae', load_folder), ('tokenizer', load_tokenizer)])
@pytest.mark.parametrize('part', ['config.json', 'model.safetensors'])
def test_missing_files(copy, name, load, part):
    (folder := copy(name)).joinpath(part).unlink()
    sentence(load, folder, part)

def test_a_list_of_digests_that_lists_too_little(copy):
    folder = copy('mae', sums=True)
    (folder/'SHA256SUMS').write_text(''.join(l for l in (folder/'SHA256SUMS').open() if 'model' not in l))
    sentence(load_folder, folder, 'SHA256SUMS')

@pytest.mark.parametrize('name,load', [('mae', load_folder), ('tokenizer', load_tokenizer)])
@pytest.mark.parametrize('text', ['', 'null', '[]', '3', '"text"', '{', '{"architecture"', '[' * 100_000, '{"a": NaN}', '\0\0\0', '{}', '\udcff'])
def test_configs_that_are_none(copy, name, load, text):
    folder = copy(name)
    (folder/'config.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    sentence(load, folder)

# Edited encoders

@pytest.mark.parametrize('architecture', ['', 'vit_from_mars', 3, None, ['vit_base_patch16_224'], {}, 'local-dir:/tmp', 'hf-hub:a/b', 'x'*10_000, '../..', 'vit_base_patch16_224\n'])
def test_architectures_that_timm_does_not_have(copy, architecture):
    sentence(load_folder, copy('mae', architecture=architecture), 'architecture')

def test_another_architecture(copy):
    for name in ('resnet10t', 'beit_base_patch16_224', 'vit_giant_patch14_dinov2', 'swin_tiny_patch4_window7_224', 'mixmim_huge'):
        sentence(load_folder, copy('mae', architecture=name))

ARGS = dict(img_size=28, patch_size=4, in_chans=1, num_classes=0, embed_dim=96, depth=4, num_heads=3)

@pytest.mark.parametrize('change', [
    dict(embed_dim=10**9), dict(embed_dim=96*1000), dict(img_size=10**6), dict(img_size=2800), dict(img_size=[28, 10**9]), dict(depth=10**9), dict(depth=50), dict(depth=5),
    dict(patch_size=0), dict(patch_size=-4), dict(patch_size=2), dict(in_chans=10**9), dict(in_chans=3), dict(num_classes=10**9), dict(num_heads=0),
    dict(num_heads=5), dict(num_heads=10**9), dict(mlp_ratio=1e12), dict(mlp_ratio=1e300), dict(mlp_ratio='4'), dict(drop_path_rate='x'), dict(class_token=False), dict(reg_tokens=10**9),
    dict(norm_layer='exec'), dict(act_layer='os.system'), dict(block_fn='x'), dict(embed_dim=None), dict(embed_dim=[96]), dict(embed_dim={'a': 1}), dict(embed_dim='96'), dict(unknown=1),
    dict(img_size=30), dict(global_pool='everything'), dict(depth=1.5), dict(embed_dim=1e3), dict(self=1), dict(img_size=True)])
def test_arguments_that_do_not_fit(copy, change):
    "Refused before memory is taken or anything loops"
    sentence(load_folder, copy('mae', model_args=ARGS | change))

@pytest.mark.parametrize('args', [3, 'x', [1], [[1, 2]], True])
def test_arguments_that_are_none(copy, args): sentence(load_folder, copy('mae', model_args=args), 'model_args')

@pytest.mark.parametrize('change', [dict(depths=[10**9, 3]), dict(depths=[1]*10_000), dict(depths=10**9), dict(window_size=10**9), dict(window_size=0), dict(num_heads=[0, 1]), dict(embed_dim=48.5)])
def test_mixmims_arguments(copy, change):
    args = json.loads((copy('mixmim')/'config.json').read_text())['model_args'] | change
    sentence(load_folder, copy('mixmim', model_args=args))

@pytest.mark.parametrize('key,value', [('pretrained', True), ('checkpoint_path', 'evil.pth'), ('pretrained_cfg', {'url': 'http://127.0.0.1:9/x'}), ('pretrained_cfg_overlay', {'file': 'evil.pth'}),
    ('cache_dir', '/nowhere'), ('scriptable', True), ('features_only', True), ('pretrained_filter_fn', 'x'), ('pretrained_custom_load', True), ('model_name', 'resnet18'), ('pretrained_strict', False)])
def test_arguments_that_choose_files_are_dropped(copy, saved, key, value):
    x = torch.rand(1,1,28,28)
    again = load_folder(copy('mae', model_args=ARGS | {key: value}))
    assert torch.equal(again(x), load_folder(saved/'mae')(x))

@pytest.mark.parametrize('key,value', [('url', 'http://127.0.0.1:9/x'), ('file', 'evil.pth'), ('hf_hub_id', 'a/b'), ('source', 'hf-hub'), ('custom_load', True), ('state_dict', {'a': 1}), ('nonsense', 1)])
def test_sources_of_weights_are_dropped(copy, saved, key, value):
    cfg = json.loads((saved/'mae'/'config.json').read_text())['pretrained_cfg']
    again,x = load_folder(copy('mae', pretrained_cfg=cfg | {key: value})),torch.rand(1,1,28,28)
    assert torch.equal(again(x), load_folder(saved/'mae')(x))
    assert not {'url', 'file', 'hf_hub_id', 'state_dict', 'nonsense'} & again.pretrained_cfg.keys()

@pytest.mark.parametrize('change', [dict(mean=['x']), dict(mean=[None]), dict(std=[0.]), dict(std=[-1.]), dict(std=[1e400]), dict(std=[.1,.2]), dict(mean=[[.1,.2]]), dict(mean={}), dict(mean=[]), dict(input_size=3),
    dict(input_size=[1,28]), dict(input_size=[0,28,28]), dict(input_size=[1,10**9,28]), dict(input_size='abc'), dict(input_size=[3,28,28]), dict(input_size=[1,56,56])])
def test_images_that_do_not_fit(copy, saved, change):
    cfg = json.loads((saved/'mae'/'config.json').read_text())['pretrained_cfg']
    sentence(load_folder, copy('mae', pretrained_cfg=cfg | change))

@pytest.mark.parametrize('change', [lambda w: {**w, 'evil': torch.ones(1)}, lambda w: {k: v for k,v in w.items() if k!='pos_embed'}, lambda w: {f'module.{k}': v for k,v in w.items()}, lambda w: {},
    lambda w: {**w, 'pos_embed': torch.ones(1,197,96)}, lambda w: {**w, 'norm.weight': torch.full((96,), float('nan'))}, lambda w: {**w, 'norm.weight': torch.full((96,), float('inf'))}, lambda w: {**w, 'a\nb': torch.ones(1)}])
def test_other_weights(copy, change):
    folder = copy('mae')
    save_file(change(load_file(folder/'model.safetensors')), folder/'model.safetensors')
    sentence(load_folder, folder)

def test_memory_out_of_proportion(saved):
    "BEiT's index of offsets is stored nowhere, and grows with the square of the patches"
    args = json.loads((saved/'beit'/'config.json').read_text())['model_args']
    with pytest.raises(ValueError, match='GiB of memory, out of proportion'): check_memory(on_meta('beit_base_patch16_224', args | dict(img_size=1600), {}, 'it'), 10**6, 'it')
    for size in (1600, 10**6, 10**9, 0, -28, 2.5, 30, (28, 28, 28), 'x'):
        sentence(lambda f: load_folder(f, img_size=size), saved/'beit')

# Beside the weights

@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'model.PTH', 'a.pt', 'last.ckpt', 'x.pkl', 'x.pickle', 'model.pth.tar', 'open_clip_pytorch_model.bin'])
def test_pickles_beside_the_weights(copy, name):
    folder = copy('mae', sums=True)
    (folder/name).write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    sentence(load_folder, folder, f'{name} beside model.safetensors')

def test_only_pickles(tmp_path):
    (tmp_path/'config.json').write_text('{"architecture": "vit_base_patch16_224"}')
    (tmp_path/'pytorch_model.bin').write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    assert encoder_folder(tmp_path) is None
    sentence(load_folder, tmp_path, 'holds no encoder')

@pytest.mark.parametrize('name', ['no', '', '\0', 'x'*5000, 'a/../..', 'local-dir:', 'local-dir:x', 'hf-hub:a/b', None, 3])
def test_names_that_are_no_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encoder_folder(name) is None
    sentence(load_folder, name, 'holds no encoder')

# What works

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('size,patch', [(28, 4), ((28, 20), 4), ((24, 48), (4, 8))])
def test_oblong_images_and_patches_come_back(name, size, patch, tmp_path):
    "From a folder by us and by timm, as a method, and for images of twice the size"
    if name=='mixmim': patch,size = (2, 4) if isinstance(patch, tuple) else 2,size if size!=(28, 20) else (28, 56)
    torch.manual_seed(0)
    m = create(name, img_size=size, patch_size=patch, **(dict(window=None) if name=='mixmim' else {})).eval()
    if 'beit' in name: torch.nn.init.normal_(m.encoder.rel_pos_bias.relative_position_bias_table)
    save_encoder(m, tmp_path/'e')
    x = torch.rand(2, 1, *m.img_size)
    with torch.no_grad():
        want = m.encoder.forward_features(x)
        e,back = load_folder(tmp_path/'e'),load_official(name, tmp_path/'e'/'model.safetensors')
        found = [e, back.encoder]
        able = size==28 or hasattr(timm.models.beit.Beit, 'set_input_size')        # older versions of timm take oblong tables for square ones
        if able or 'beit' not in name: found.append(timm.create_model(f"local-dir:{tmp_path/'e'}", pretrained=True).eval())
        assert all(torch.allclose(o.forward_features(x), want, atol=1e-5) for o in found)
    assert e.pretrained_cfg['input_size']==(1, *m.img_size) and back.img_size==m.img_size and back.patch_size==m.patch_size
    twice = tuple(2*s for s in m.img_size)
    try: save_encoder(m, tmp_path/'twice', img_size=twice)
    except ValueError as e:
        assert not able and 'take a newer timm' in str(e)
        return
    assert load_folder(tmp_path/'twice')(torch.rand(1, 1, *twice)).isfinite().all()

def test_a_run_and_timms_prefix(saved, tmp_path):
    shutil.copytree(saved/'mae', tmp_path/'run'/'encoder')
    (tmp_path/'run'/'last.ckpt').write_bytes(b'in the run, not in the encoder')
    for name in (tmp_path/'run', tmp_path/'run'/'encoder', f"local-dir:{tmp_path/'run'/'encoder'}"): assert not load_folder(name).training

def test_other_arguments(saved):
    m = load_folder(saved/'mae', num_classes=10, global_pool='avg')
    assert m(torch.rand(2,1,28,28)).shape==(2,10) and 'state_dict' not in m.pretrained_cfg

def test_a_folder_that_timm_wrote(tmp_path):
    "No model_args, no list of digests, a classifier: whatever timm can save"
    m = timm.create_model('resnet10t', num_classes=7).eval()
    timm.models.save_for_hf(m, tmp_path, safe_serialization=True)
    x = torch.rand(1,3,64,64)
    assert torch.equal(load_folder(tmp_path)(x), m(x))

def test_half_precision(copy):
    folder = copy('mae')
    weights = load_file(folder/'model.safetensors')
    save_file({k: v.half() for k,v in weights.items()}, folder/'model.safetensors')
    assert all(torch.equal(v, weights[k].half().float()) for k,v in load_folder(folder).state_dict().items())

def test_mixmim_without_its_import(saved, tmp_path):
    "timm's registry is filled by `import mim_nb.timm_models` alone; whoever looks for timm first changes nothing"
    import subprocess, sys
    code = '''
import importlib.util, sys
import mim_nb; importlib.util.find_spec('timm')
from mim_nb.folders import load_folder
try: load_folder(sys.argv[1])
except ValueError as e: assert 'import mim_nb.timm_models' in str(e), e
else: raise SystemExit('it was loaded')
import mim_nb.timm_models, timm
timm.create_model('mixmim_base', embed_dim=16, depths=(1,1), img_size=32)
load_folder(sys.argv[1])
'''
    r = subprocess.run([sys.executable, '-c', code, str(saved/'mixmim')], capture_output=True, text=True, timeout=120)
    assert r.returncode==0, r.stderr
    assert 'import mim_nb.timm_models' in str(unknown_model('mixmim_base')) and 'list_models' in str(unknown_model('x'))

def test_nothing_but_a_version_in_the_package():
    assert (Path(__file__).parents[1]/'mim_nb'/'__init__.py').read_text().count('\n')==1

# Tokenizers

@pytest.mark.parametrize('change', [dict(vocab_size=10**12), dict(vocab_size=33), dict(width=10**9), dict(width=2**12), dict(depth=10**9), dict(depth=2), dict(img_size=10**9), dict(img_size=30), dict(patch_size=0),
    dict(patch_size=7), dict(in_chans=3), dict(tau=[1]), dict(tau=None), dict(tau=[1, 0]), dict(balance='x'), dict(beta=None), dict(unknown=1), dict(architecture='x'), dict(method='beit'), dict(img_size=[28, 28, 28])])
def test_edited_tokenizers(copy, change): sentence(load_tokenizer, copy('tokenizer', **change))

def test_other_folders_are_no_tokenizers(saved, tmp_path):
    sentence(load_tokenizer, saved/'mae', "an encoder's")
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'config.json').write_text('{"method": "beit"}')
    sentence(load_tokenizer, tmp_path/'run', "not a tokenizer's folder")
    sentence(load_tokenizer, tmp_path, "not a tokenizer's folder")
    sentence(load_tokenizer, __file__, "not a tokenizer's folder")

def test_tokenizers_that_are_not_finite(copy):
    folder = copy('tokenizer')
    weights = load_file(folder/'model.safetensors')
    save_file({k: v*float('nan') for k,v in weights.items()}, folder/'model.safetensors')
    sentence(load_tokenizer, folder, 'not finite')

BAD = [dict(img_size=0), dict(img_size=2.5), dict(img_size=None), dict(img_size=(28,28,28)), dict(img_size=30), dict(patch_size=0), dict(patch_size=1), dict(patch_size='4'), dict(in_chans=0), dict(in_chans=1.5),
    dict(vocab_size=0), dict(vocab_size=1), dict(vocab_size=-5), dict(vocab_size=True), dict(width=0), dict(width=-1), dict(width=float('nan')), dict(depth=-1), dict(depth=1.5), dict(depth=None), dict(tau=1.), dict(tau=(1.,)),
    dict(tau=(1., 0.)), dict(tau=(-1., .1)), dict(tau=(float('nan'), .1)), dict(tau='ab'), dict(balance=float('nan')), dict(balance=float('inf')), dict(balance=None), dict(beta=float('nan')), dict(beta='0')]

@pytest.mark.parametrize('bad', BAD, ids=str)
def test_constructor_of_a_tokenizer(bad):
    with pytest.raises(ValueError) as e: DVAE(**bad)
    assert len(str(e.value).splitlines())==1 and len(str(e.value))>30

@pytest.mark.parametrize('size,patch', [((28, 20), 4), ((24, 16), (4, 2)), ((28, 12), (14, 3)), ((6, 16), (1, 8))])
def test_oblong_tokenizers(size, patch, tmp_path):
    "They train, save, come back, and teach BEiT"
    torch.manual_seed(0)
    t,x = DVAE(size, patch, width=16, vocab_size=8, depth=1),torch.rand(2,1,*size)
    out = t(x)
    out.loss.backward()
    assert out.recon.shape==x.shape and t.decode(t.ids(x)).shape==x.shape and all(p.grad is not None for p in t.parameters())
    save_tokenizer(t.eval(), tmp_path/'t')
    assert torch.equal(load_tokenizer(tmp_path/'t').ids(x), t.ids(x))
    m = create('beit', img_size=size, patch_size=patch, vocab_size=8, tokenizer=t)
    m(x).loss.backward()

def test_the_users_folders_are_left_alone(tmp_path):
    "Only what was written here is replaced, and OUT.tmp is anybody's"
    for name in ('mine.tmp', 'mine'): (tmp_path/name).mkdir(); (tmp_path/name/'thesis.tex').write_text('years of work')
    t = DVAE(width=16, vocab_size=8, depth=0)
    with pytest.raises(OSError): save_tokenizer(t, tmp_path/'mine')
    with pytest.raises(OSError): save_encoder(create('mae'), tmp_path/'mine')
    for _ in range(2): save_encoder(create('mae'), tmp_path/'new')
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*'))==['mine', 'mine.tmp', 'mine.tmp/thesis.tex', 'mine/thesis.tex',
        'new', 'new/SHA256SUMS', 'new/config.json', 'new/model.safetensors']
