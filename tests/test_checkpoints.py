"Published weights in, timm and Hugging Face out: every key, every bad file, and the reference's numbers through exported folders"
import json, random, resource, struct, subprocess, sys, time, types, warnings, zipfile
from pathlib import Path
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from mim_nb.checkpoints import build, load_official, looks_like, translate
from mim_nb.pickles import read_weights, unwrap
from mim_nb.convert import mim_convert_cli, push_to_hub, save_transformers
from mim_nb.exports import save_encoder
from mim_nb.methods import create, get_method, methods
from mim_nb.tokenizers import DVAE

PARITY = Path(__file__).parent/'parity'
FILES = dict(beit='beit_a', mcbeit='mcbeit_a', mae='mae_a', deepmim='deepmim_a', saim='saim_a', mixmim='mixmim_a', dalle='dalle_encoder_a', vqgan='vqgan_encoder_a')
FIX = {n: load_file(PARITY/f'{f}.safetensors') for n,f in FILES.items()}
WEIGHTS = {n: {k.removeprefix('weights/'): v for k,v in f.items() if k.startswith('weights/')} for n,f in FIX.items()}
PLAIN = dict(mean=0., std=1.)
ARGS = dict(beit=PLAIN, mcbeit=PLAIN, mae=dict(PLAIN, num_heads=4, decoder_heads=4), deepmim=dict(PLAIN, num_heads=4, decoder_heads=4), saim=dict(PLAIN, num_heads=4), mixmim=dict(PLAIN, decoder_heads=4),
            dalle=dict(img_size=64), vqgan=dict(img_size=64))
DECODER = ('mask_token', 'lm_head', 'decoder', 'query_blocks', 'prediction_head', 'gaussian_blur')

def close(a, b, eps=1e-5): return (a-b).abs().max() <= eps*b.abs().max()
def head(width): return {'head.weight': torch.zeros(10, width), 'head.bias': torch.zeros(10)}
def encoder_only(name): return {k: v for k,v in WEIGHTS[name].items() if not k.startswith(DECODER)}
def quiet(*args, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return load_official(*args, **kw)

@pytest.fixture(scope='module')
def models(): return {n: quiet(n, WEIGHTS[n], **ARGS[n]) for n in FILES}

@pytest.fixture(scope='module')
def folders(models, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('folders')
    for n in methods: save_encoder(models[n], tmp/n)
    return tmp

# In

@pytest.mark.parametrize('name', FILES)
def test_reference_weights_fit_without_a_word(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = load_official(name, WEIGHTS[name], **ARGS[name])
    assert m.loaded.ok and not m.training and str(m.loaded)==f"{name}: {len(m.loaded.placed)} weights are in place"

def full_size(name):
    names = json.loads((PARITY/f'fullsize_{name}.json').read_text())
    return {k: FIX['saim']['weights/gaussian_blur.weight'] if k=='gaussian_blur.weight' else torch.empty(s, device='meta') for k,s in names['state_dict'].items()},names

@pytest.mark.parametrize('name', [*methods, 'dalle'])
def test_every_published_key_finds_its_place(name):
    "Nothing is left over, nothing missing, and what is left out on purpose is only what can be computed"
    sd,names = full_size('dalle_encoder' if name=='dalle' else name)
    with torch.device('meta'), warnings.catch_warnings(): warnings.simplefilter('ignore'); m,loaded = build(name, sd)
    used = {k for ks in loaded.placed.values() for k in ks}
    assert loaded.ok and loaded.missing==loaded.left==[]
    assert all(k.endswith(('relative_position_index', 'decoder_pos_embed', 'absolute_pos_embed')) for k in sd if k not in used)
    assert sum(sd[k].numel() for k in used)==sum(v.numel() for v in m.state_dict().values())

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('tuned', [False, True], ids=['encoder only', 'fine-tuned'])
def test_encoders_without_decoder(models, name, tuned):
    "The encoder is the same weight by weight; what is missing or left over is listed"
    sd = encoder_only(name)
    if tuned: sd |= head(64)
    args = {k: v for k,v in ARGS[name].items() if k!='decoder_heads'}
    with pytest.warns(UserWarning, match='are not in the file and stay as initialised') as seen: m = load_official(name, sd, **args)
    whole = models[name].encoder.state_dict()
    assert whole.keys()==m.encoder.state_dict().keys() and all(torch.equal(v, whole[k]) for k,v in m.encoder.state_dict().items())
    assert m.loaded.missing and not any(k.startswith('encoder.') for k in m.loaded.missing)
    assert m.loaded.left==(['head.weight', 'head.bias'] if tuned else []) and ('2 are left over (head.weight, head.bias)' in str(seen[0].message))==tuned

def test_decoder_sizes_may_be_given():
    m = quiet('mae', encoder_only('mae'), num_heads=4, decoder_dim=96, decoder_depth=3)
    assert m.decoder.embed.out_features==96 and len(m.decoder.blocks)==3 and m.encoder.blocks[0].attn.num_heads==4

@pytest.mark.parametrize('name', ['beit', 'mcbeit'])
def test_fine_tuned_beit_keeps_its_tables(name):
    "As the authors' fine-tuning writes them: tables and index buffers per layer, `fc_norm` for `norm`; equal to timm's model with the same weights"
    g,sd = torch.Generator().manual_seed(0),{k: v for k,v in encoder_only(name).items() if not k.startswith(('rel_pos_bias', 'norm'))}
    for i in range(3): sd |= {f'blocks.{i}.attn.relative_position_bias_table': torch.randn(52, 4, generator=g), f'blocks.{i}.attn.relative_position_index': torch.zeros(17, 17, dtype=torch.long)}
    m = quiet(name, {**sd, **head(64), 'fc_norm.weight': torch.ones(64), 'fc_norm.bias': torch.zeros(64)}, **PLAIN)
    t = Beit(64, 16, 3, num_classes=0, embed_dim=64, depth=3, num_heads=4, init_values=.1, use_abs_pos_emb=False, use_rel_pos_bias=True).eval()
    t.load_state_dict({k: v for k,v in sd.items() if not k.endswith('index')}, strict=False)
    x = FIX[name]['in/images']
    with torch.no_grad(): a,b = (e.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0] for e in (m.encoder, t))
    assert close(a, b) and set(m.loaded.left)=={'head.weight', 'head.bias', 'fc_norm.weight', 'fc_norm.bias'}
    assert {k for k in m.loaded.missing if k.startswith('encoder.')}=={'encoder.norm.weight', 'encoder.norm.bias'}

@pytest.mark.parametrize('name', ['mae', 'deepmim', 'saim'])
def test_fine_tuned_vits_that_average(name):
    sd = {('fc_'+k if k.startswith('norm.') else k): v for k,v in encoder_only(name).items()}
    m = quiet(name, {**sd, **head(48)}, num_heads=ARGS[name]['num_heads'])
    assert set(m.loaded.left)=={'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'} and torch.equal(m.encoder.norm.weight, torch.ones_like(m.encoder.norm.weight))

def test_a_linear_probe_s_head_is_left_over():
    m = quiet('saim', {**encoder_only('saim'), 'head.0.running_mean': torch.zeros(64), 'head.0.num_batches_tracked': torch.tensor(3), 'head.1.weight': torch.zeros(10, 64)}, num_heads=4)
    assert len(m.loaded.left)==3

@pytest.mark.parametrize('wrap', [lambda w: w, lambda w: dict(model=w, epoch=3), lambda w: dict(state_dict=w), lambda w: dict(model=dict(module=w)),
    lambda w: {f'module.{k}': v for k,v in w.items()}, lambda w: dict(module={f'_orig_mod.module.{k}': v for k,v in w.items()}), lambda w: {k.replace('blocks.', 'blocks._orig_mod.'): v for k,v in w.items()}])
@pytest.mark.parametrize('legacy', [False, True])
def test_wrappings(tmp_path, wrap, legacy):
    torch.save(wrap(WEIGHTS['beit']), tmp_path/'f.pth', _use_new_zipfile_serialization=not legacy)
    assert read_weights(tmp_path/'f.pth').keys()==WEIGHTS['beit'].keys()

def test_the_first_bytes_count_and_not_the_name(tmp_path):
    save_file(WEIGHTS['beit'], tmp_path/'f.pth'); torch.save(WEIGHTS['beit'], tmp_path/'f.safetensors')
    for f in ('f.pth', 'f.safetensors'): assert read_weights(tmp_path/f).keys()==WEIGHTS['beit'].keys()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    sd = {k: v.to(dtype) if v.is_floating_point() else v for k,v in WEIGHTS['beit'].items()}
    m = quiet('beit', sd, **PLAIN)
    assert all(p.dtype==torch.float32 for p in m.parameters())
    with torch.no_grad(): assert close(m.encode(FIX['beit']['in/images'], m.as_mask(FIX['beit']['in/bool_masked_pos'])), FIX['beit']['out/features'], {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5))
    if dtype!=torch.float64:
        with pytest.warns(UserWarning, match=f"stored in {str(dtype)[6:]}, and widened to float32, which adds no precision"): load_official('beit', sd)

# What does not fit

@pytest.mark.parametrize('file', FILES)
def test_a_file_of_another_method(file):
    "The sentence names whose it is"
    own = ['beit', 'mcbeit'] if file in ('beit', 'mcbeit') else [file]
    name = dict(beit='mae', mcbeit='saim', mae='deepmim', deepmim='mae', saim='mae', mixmim='beit', dalle='vqgan', vqgan='dalle')[file]
    with pytest.raises(ValueError, match=f"does not look like a published file of {name}.*It looks like {' or '.join(own)}$") as e: load_official(name, WEIGHTS[file])
    assert len(str(e.value).splitlines())==1

def test_an_encoder_could_be_several_methods(): assert {'mae', 'deepmim'} <= set(looks_like(encoder_only('mae')))

@pytest.mark.parametrize('sd,message', [
    ({'beit.embeddings.cls_token': torch.ones(1,1,8)}, "Hugging Face's transformers"), ({'vit.encoder.layer.0.output.dense.weight': torch.ones(2,2)}, "Hugging Face's transformers"),
    ({'visual.conv1.weight': torch.ones(8,3,2,2)}, 'CLIP'), ({'a.weight': torch.ones(2)}, 'but for instance a.weight')])
def test_other_layouts(sd, message):
    with pytest.raises(ValueError, match=f"does not look like a published file of beit.*{message}"): load_official('beit', sd)

def test_a_checkpoint_of_this_package(tmp_path):
    torch.save(dict(step=3, model=create('mae').state_dict(), settings={}), tmp_path/'last.ckpt')
    with pytest.raises(ValueError, match="a checkpoint of this package: its encoder lies in the run's folder"): load_official('mae', tmp_path/'last.ckpt')

@pytest.mark.parametrize('change,message', [
    (lambda w: {**w, 'blocks.1.mlp.fc1.weight': torch.ones(384,96)}, r"blocks.1.mlp.fc1.weight has shape \(384, 96\) where the other weights ask for \(256, 64\): the file mixes models of different sizes"),
    (lambda w: {k: v for k,v in w.items() if 'blocks.1.' not in k}, 'could not be placed|missing'),
    (lambda w: {k: v for k,v in w.items() if 'blocks.1.norm2' not in k}, r'2 weights are missing \(encoder.blocks.1.norm2.weight, encoder.blocks.1.norm2.bias\)'),
    (lambda w: {**w, 'pos_embed': torch.ones(1,17,64)}, r'1 of its weights could not be placed \(pos_embed\)'),
    (lambda w: {**w, 'norm.weight': torch.full((64,), float('nan'))}, 'norm.weight holds values that are not finite'),
    (lambda w: {**w, 'patch_embed.proj.weight': torch.ones(64,768)}, r'patch embedding has shape \(64, 768\)')])
def test_files_that_are_wrong_in_parts(change, message):
    with pytest.raises(ValueError, match=message) as e: load_official('beit', change(WEIGHTS['beit']))
    assert len(str(e.value).splitlines())==1 and 'looks like' not in str(e.value).replace('does not look like', '')

@pytest.mark.parametrize('name', methods)
def test_half_of_a_model(name):
    "An encoder's weight may be lacking: one sentence"
    lost = next(k for k in encoder_only(name) if 'blocks.0.mlp.fc1' in k)
    with pytest.raises(ValueError, match='does not look like a published file'): load_official(name, {k: v for k,v in WEIGHTS[name].items() if k!=lost}, **ARGS[name])

def test_wrong_arguments_keep_their_own_sentence():
    with pytest.raises(ValueError, match='^mask_ratio must be'): load_official('beit', WEIGHTS['beit'], mask_ratio=2)
    with pytest.raises(ValueError, match="did you mean 'beit'"): load_official('biet', WEIGHTS['beit'])

@pytest.mark.parametrize('name,data,message', [('a.pth', b'<!DOCTYPE html><html>', "text file that begins with '<!DOCTYPE html>"), ('a.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:12', "text file that begins with 'version https://git-lfs"),
    ('a.pth', 'größer'.encode(), 'text file'), ('a.pth', b'', 'text file'), ('a.pth', bytes(100), 'truncated, or of another kind')], ids=range(5))
def test_no_weights_at_all(tmp_path, name, data, message):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(ValueError, match=f'cannot be read as weights.*{message}'): read_weights(tmp_path/name)

@pytest.mark.parametrize('part', [.02, .5, .999])
@pytest.mark.parametrize('save,name', [(save_file, 'w.safetensors'), (torch.save, 'w.pth')])
def test_truncated_files(tmp_path, part, save, name):
    save(WEIGHTS['beit'], tmp_path/name)
    data = (tmp_path/name).read_bytes(); (tmp_path/name).write_bytes(data[:int(len(data)*part)])
    with pytest.raises(ValueError, match='truncated, or of another kind') as e: load_official('beit', tmp_path/name)
    assert len(str(e.value).splitlines())==1

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('small'); w = dict(a=torch.ones(3), b=torch.arange(4))
    save_file(w, tmp/'0'); torch.save(w, tmp/'1'); torch.save(w, tmp/'2', _use_new_zipfile_serialization=False)
    return tmp

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.integers(0, 2**30), st.integers(1, 8))
def test_damaged_files_end_with_a_sentence(small, kind, seed, n):
    data,g = bytearray((small/str(kind)).read_bytes()),torch.Generator().manual_seed(seed)
    for i in torch.randint(len(data), (n,), generator=g): data[i] = int(torch.randint(256, (1,), generator=g))
    (small/'damaged').write_bytes(data)
    try: read_weights(small/'damaged')
    except ValueError as e: assert 'cannot be read' in str(e) or 'checkpoint' in str(e)

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize('legacy', [False, True])
def test_nothing_in_a_file_runs(tmp_path, legacy):
    torch.save(dict(model=WEIGHTS['beit'], extra=Evil(tmp_path/'pwned')), tmp_path/'evil.pth', _use_new_zipfile_serialization=not legacy)
    m = quiet('beit', tmp_path/'evil.pth')
    assert m.loaded.ok and not (tmp_path/'pwned').exists()

# Files made to do harm

def sentence(f, match=''):
    "One sentence, soon and without taking memory"
    start,before = time.perf_counter(),resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=match) as e: f()
    assert len(str(e.value).splitlines())==1 and time.perf_counter()-start<30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before < 300_000           # kB

def archive(path, pkl, compress=zipfile.ZIP_STORED, **records):
    "A zip archive as torch.save makes it, with this pickle"
    with zipfile.ZipFile(path, 'w', compress) as z:
        z.writestr('archive/data.pkl', pkl)
        for k,v in records.items(): z.writestr(f'archive/data/{k}', v)
    return path

def tensor(shape, strides, numel=1, offset=0, key='0', dtype='Float'):
    "The pickle of one tensor"
    numbers = lambda ns: b'(' + b''.join(b'I%d\n' % n for n in ns) + b't'
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\n%sStorage\nS'%s'\nS'cpu'\nI%d\ntQI%d\n" % (dtype.encode(), key.encode(), numel, offset)
            + numbers(shape) + numbers(strides) + b'tR')

def in_dict(*values): return b'}' + b''.join(b"S'w%d'\n" % i + v + b's' for i,v in enumerate(values)) + b'.'

def test_wrappings_without_end(tmp_path):
    loop = {'a': torch.ones(1)}; loop['model'] = loop
    torch.save(loop, tmp_path/'loop.pth')
    sentence(lambda: read_weights(tmp_path/'loop.pth'), 'holds itself')
    deep = archive(tmp_path/'deep.pth', b'}S"model"\n'*10_000 + b'}S"a"\nI1\ns' + b's'*10_000 + b'.')
    sentence(lambda: read_weights(deep), 'wrapped more than 10 times')

@pytest.mark.parametrize('o', [{0: torch.ones(1)}, {None: torch.ones(1), (1,2): torch.ones(2)}, {'model': {3: torch.ones(1)}}, {'model': 3}, {'a': 1}, [], 3, 'text', None, torch.ones(3), {'a\nb': torch.ones(1)},
    {'a': torch.ones(2).to_sparse()}, {'a': torch.ones(2, dtype=torch.complex64)}, {f'w{i}': torch.ones(1) for i in range(10_001)}], ids=range(14))
def test_what_is_no_checkpoint(tmp_path, o):
    torch.save(o, tmp_path/'f.pth')
    sentence(lambda: load_official('beit', tmp_path/'f.pth'))
    sentence(lambda: unwrap(o))

@pytest.mark.parametrize('pkl', [in_dict(tensor([10**6,10**6], [0,0])), in_dict(tensor([1], [-1])), in_dict(tensor([1], [1], offset=-1)), in_dict(tensor([1], [1], offset=9)), in_dict(tensor([-1], [1])),
    in_dict(tensor([2], [1])), in_dict(tensor([1], [1], numel=-1)), in_dict(tensor([1], [1], numel=10**15)), in_dict(tensor([1], [1], key='none')), in_dict(tensor([1], [1], key='../../etc/passwd')),
    in_dict(tensor([2**62]*3, [0]*3)), in_dict(tensor([1], [1], dtype='Nonsense')), b'', b'.', b'}', b'(', b'R.', b'\x80\xff.', b'}r\xff\xff\xff\xff.', b'}p99999999999\n.', b'\x80\x05\x96' + bytes([255]*7 + [127]) + b'.',
    b'\x80\x04\x8e' + bytes([255]*7 + [127]) + b'.', b'\x80\x04\x95' + bytes([255]*7 + [127]) + b'}.', b'I' + b'9'*100_000 + b'\n.', b'('*1_000_000 + b'.', b'\x80\x02\x8b\xff\xff\xff\x7f.'], ids=range(26))
def test_pickles_that_lie(tmp_path, pkl):
    "Shapes, strides and lengths that are not so"
    sentence(lambda: read_weights(archive(tmp_path/'f.pth', pkl, **{'0': bytes(4)})))

def test_the_same_numbers_many_times(tmp_path):
    many = in_dict(*[tensor([10_000], [1], numel=10_000) for _ in range(2000)])
    sentence(lambda: read_weights(archive(tmp_path/'f.pth', many, **{'0': bytes(40_000)})), 'under many names')

def test_tuples_of_tuples(tmp_path):
    "Hashing such a key would take longer than a life"
    tuples = b'I0\nq\x00' + b''.join(b'0h' + bytes([i]) + b'h' + bytes([i]) + b'\x86q' + bytes([i+1]) for i in range(60))
    for use in (b'0}h\x3cI1\ns.', b'0(h\x3cI1\nd.', b'0}(h\x3cI1\nu.', b'0(h\x3c\x91.', b'0\x8f(h\x3c\x90.', b'0ccollections\nOrderedDict\n((h\x3cI1\ntttR.'):
        sentence(lambda: read_weights(archive(tmp_path/'f.pth', b'\x80\x04' + tuples + use)))

def test_zip_bombs(tmp_path):
    sentence(lambda: read_weights(archive(tmp_path/'f.pth', in_dict(tensor([1], [1])), zipfile.ZIP_DEFLATED, **{'0': bytes(50_000_000)})), 'compressed')
    good = archive(tmp_path/'g.pth', in_dict(tensor([1000], [1], numel=1000)), **{'0': bytes(4000)})
    with zipfile.ZipFile(good, 'a') as z:
        for i in range(50):                                                 # entries of the list that point to the same record
            info = zipfile.ZipInfo(f'archive/data/{i+1}')
            for k in ('header_offset', 'file_size', 'compress_size', 'CRC', 'compress_type'): setattr(info, k, getattr(z.getinfo('archive/data/0'), k))
            z.filelist.append(info); z.NameToInfo[info.filename] = info
        z._didModify = True
    sentence(lambda: read_weights(good), 'overlap')

def test_modules_that_hold_each_other(tmp_path):
    class M(torch.nn.Module): pass
    m = torch.nn.Module(); m.a = torch.nn.Parameter(torch.ones(1))
    m._modules['x'] = m._modules['y'] = m
    torch.save(m, tmp_path/'m.pkl')
    sentence(lambda: read_weights(tmp_path/'m.pkl'), 'without end')

def test_every_flipped_bit_in_the_records_of_an_archive(tmp_path):
    "1,000 bits and 100 pages: the numbers are as before, or the file is refused"
    weights = {k: v for k,v in WEIGHTS['mae'].items() if k.startswith('blocks.0')}
    torch.save(weights, tmp_path/'f.pth')
    original,rng,noticed = (tmp_path/'f.pth').read_bytes(),random.Random(0),0
    for i in range(1100):
        data = bytearray(original); at = rng.randrange(len(data))
        if i<1000: data[at] ^= 1<<rng.randrange(8)
        else: page = at//4096*4096; data[page:page+4096] = bytes(len(data[page:page+4096]))
        (tmp_path/'g.pth').write_bytes(data)
        try: w = read_weights(tmp_path/'g.pth')
        except ValueError as e: noticed += 1
        else: assert w.keys()==weights.keys() and all(torch.equal(v, weights[k]) for k,v in w.items()), (i, at)
    assert noticed>900                                                      # the others hit the padding between two records

def test_safetensors_that_lie(tmp_path):
    def write(header, data=b''): (tmp_path/'f.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + data)
    for header in (b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}', b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
                   b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b'{}', b'{', b'{"a":1}', b'{"__metadata__":{"a":"b"}}', b'{"a":'*10_000):
        write(header, bytes(4))
        sentence(lambda: load_official('beit', tmp_path/'f.safetensors'))
    (tmp_path/'f.safetensors').write_bytes(struct.pack('<Q', 2**62) + b'{}')
    sentence(lambda: read_weights(tmp_path/'f.safetensors'))

def test_shapes_out_of_proportion(tmp_path):
    "A table of few bytes may ask for an index that is its square, and a width of nothing for matrices of a billion"
    sd = encoder_only('beit')
    table = torch.zeros((2*600-1)**2+3, 1)
    big = {k: (table if k.endswith('bias_table') else v) for k,v in sd.items()}
    sentence(lambda: quiet('beit', big), 'too long|out of proportion')
    flat = {**sd, 'patch_embed.proj.weight': torch.ones(10**8, 0, 16, 16)}
    sentence(lambda: quiet('beit', flat))
    deep = {**sd, **{f'blocks.{i}.gamma_1': torch.ones(64) for i in range(3, 5000)}}
    sentence(lambda: quiet('beit', deep))

# Heads

def test_heads_that_nobody_told():
    with pytest.warns(UserWarning, match=r'1 head assumed: width / 64; \d heads? of the decoder assumed: width / 32'): m = load_official('mae', WEIGHTS['mae'])
    assert m.loaded.assumed and '1 head assumed' in str(m.loaded)
    assert quiet('mae', WEIGHTS['mae'], num_heads=4, decoder_heads=4).loaded.assumed==()
    assert quiet('beit', WEIGHTS['beit']).loaded.assumed==()                # its bias table tells

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('by', ['file', 'folder', 'run'])
def test_our_own_export_tells_its_heads(name, by, tmp_path):
    "Also windows, and how images were normalised"
    torch.manual_seed(0)
    m,x = create(name, mean=.3, std=.2).eval(),torch.rand(2,1,28,28)
    save_encoder(m, tmp_path/'run'/'encoder')
    back = quiet(name, tmp_path/dict(file='run/encoder/model.safetensors', folder='run/encoder', run='run')[by])
    with torch.no_grad(): a,b = back.encoder.forward_features(back.normalize(x)),m.encoder.forward_features(m.normalize(x))
    assert close(a, b)
    assert back.loaded.assumed==()

def test_an_export_of_another_method(tmp_path):
    save_encoder(create('mixmim'), tmp_path/'e')
    sentence(lambda: load_official('mae', tmp_path/'e'), 'holds an encoder that mae cannot take')
    save_encoder(create('mae'), tmp_path/'f')
    (tmp_path/'f'/'config.json').write_text('{"architecture": ')
    sentence(lambda: load_official('mae', tmp_path/'f'/'model.safetensors'), 'SHA256SUMS|config.json')

# Out

PROCESS = '''
import sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file
folders,parity = map(Path, sys.argv[1:])
def load(n): return timm.create_model(f'local-dir:{folders/n}', pretrained=True).eval(),load_file(parity/f'{n}_a.safetensors')
def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()
def tokens(e, patches): return torch.cat([e.cls_token.expand(len(patches), -1, -1), patches], 1)
def run(e, x, upto=None, **kw):
    for block in list(e.blocks)[:upto]: x = block(x, **kw)
    return x
with torch.no_grad():
    for n in ('beit', 'mcbeit'):
        e,f = load(n)
        x = torch.where(f['in/bool_masked_pos'][...,None], f['weights/mask_token'], e.patch_embed(f['in/images']))
        assert close(e.norm(run(e, tokens(e, x))), f['out/features']), n
    for n in ('mae', 'deepmim'):
        e,f = load(n); want = f['out/latent' if n=='mae' else 'out/latent12']
        keep = f['in/noise'].argsort(1)[:,:want.shape[1]-1,None].expand(-1, -1, want.shape[2])
        x = (e.patch_embed(f['in/images'])+e.pos_embed[:,1:]).gather(1, keep)
        x = torch.cat([(e.cls_token+e.pos_embed[:,:1]).expand(len(x), -1, -1), x], 1)
        assert close(e.norm(run(e, x)), want), n
        if n=='deepmim':
            for d in (6,8,10): assert close(run(e, x, d), f[f'out/latent{d}']), d
    e,f = load('saim')
    x = run(e, tokens(e, e.patch_embed(f['in/images']))+e.pos_embed, attn_mask=f['out/content_visible'][:,None].bool())
    assert close(x, f['out/h']) or close(e.norm(x), f['out/h']), 'saim'
assert not any(k.startswith('mim_nb') for k in sys.modules)
'''

def test_plain_timm_gives_the_reference_s_features(folders):
    "Five methods through exported folders, in a process that never imports this package"
    r = subprocess.run([sys.executable, '-c', PROCESS, str(folders), str(PARITY)], capture_output=True, text=True, timeout=300, cwd=folders)
    assert r.returncode==0, r.stderr

def test_mixmim_through_timm(folders, models):
    m = models['mixmim']; before = m.encoder
    cells = FIX['mixmim']['out/mask_s4'].flatten().bool()
    try:
        m.encoder = timm.create_model(f"local-dir:{folders/'mixmim'}", pretrained=True).eval()
        with torch.no_grad(): z = [m.encode(FIX['mixmim']['in/images'], m.as_mask(c)) for c in (~cells, cells)]
    finally: m.encoder = before
    assert any(close(t.reshape(FIX['mixmim']['out/z'].shape), FIX['mixmim']['out/z']) for t in z)

def reference_encoder(m, size):
    "The encoder at another size, its tables resampled by timm's functions, one by one"
    e,_,args = m.export_encoder(); old = e.state_dict()
    big = timm.create_model('vit_base_patch16_224' if 'pos_embed' in old else 'beit_base_patch16_224', **{**args, 'img_size': size}).eval(); grid = big.patch_embed.grid_size
    new = {k: resample_abs_pos_embed(v, grid) if k=='pos_embed' else resize_rel_pos_bias_table(v, grid, big.state_dict()[k].shape) if k.endswith('bias_table') else v for k,v in old.items()}
    big.load_state_dict(new); return big

@pytest.mark.parametrize('name', methods)
def test_other_image_sizes(models, folders, tmp_path, name):
    "64 to 128 pixels (as 224 to 384): the exported folder equals what timm makes of the small one, and, for ViTs, tables resampled by hand"
    m = models[name]; save_encoder(m, tmp_path/'big', img_size=128)
    cfg = json.loads((tmp_path/'big'/'config.json').read_text())
    assert cfg['model_args']['img_size']==128 and cfg['pretrained_cfg']['input_size']==[3,128,128]
    big,x = timm.create_model(f"local-dir:{tmp_path/'big'}", pretrained=True).eval(),torch.rand(2,3,128,128)
    others = [timm.create_model(f'local-dir:{folders/name}', pretrained=True, img_size=128, **(dict(window_size=8) if name=='mixmim' else {})).eval()] + ([reference_encoder(m, 128)] if name!='mixmim' else [])
    with torch.no_grad():
        for o in others: assert close(big.forward_features(x), o.forward_features(x))
    with pytest.raises(ValueError, match='100'): save_encoder(m, tmp_path/'big', img_size=100)

@pytest.mark.parametrize('name,args,resized', [('beit', {}, {}), ('mae', {}, {}), ('mixmim', {}, {}), ('mixmim', dict(window=[14,14,14,7]), {}), ('mixmim', dict(window=[14,14,14,7]), dict(window_size=[16,16,24,12]))])
def test_224_to_384(tmp_path, name, args, resized):
    "The usual step, at the usual patch size, in narrow networks"
    args |= dict(patch_size=4, depths=[1]*4, num_heads=[1]*4) if name=='mixmim' else dict(patch_size=16, depth=1, num_heads=2)
    save_encoder(create(name, img_size=224, in_chans=3, embed_dim=32, **args), tmp_path/'e', img_size=384, **resized)
    e = timm.create_model(f"local-dir:{tmp_path/'e'}", pretrained=True).eval()
    with torch.no_grad(): assert e.forward_features(torch.rand(1,3,384,384)).isfinite().all()
    if name=='mixmim': assert e.windows==([(16,16), (16,16), (24,24), (12,12)] if resized else [(24,24)]*3+[(12,12)])

def test_a_folder_that_holds_other_things_is_left_alone(models, tmp_path):
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(FileExistsError, match='other things than an exported model, such as thesis.tex'): save_encoder(models['beit'], tmp_path)
    with pytest.raises(FileExistsError, match='is a file'): save_encoder(models['beit'], tmp_path/'thesis.tex')
    assert [f.name for f in tmp_path.iterdir()]==['thesis.tex']
    for _ in range(2): save_encoder(models['beit'], tmp_path/'new'/'encoder')
    assert {f.name for f in (tmp_path/'new'/'encoder').iterdir()}=={'config.json', 'model.safetensors', 'SHA256SUMS'}

# The command

def command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['mim_convert', *map(str, args)])
    code = mim_convert_cli(); out,err = capsys.readouterr()
    return code,out,err

@pytest.mark.parametrize('name', methods)
def test_convert(models, folders, tmp_path, monkeypatch, capsys, name):
    torch.save(dict(model=WEIGHTS[name]), tmp_path/'f.pth')
    heads = ['--heads', ARGS[name]['num_heads']] if 'num_heads' in ARGS[name] else []
    try: code,out,err = command(monkeypatch, capsys, tmp_path/'f.pth', name, tmp_path/'out', '--mean', 0, '--std', 1, *heads)
    except SystemExit: pytest.fail(capsys.readouterr().err)
    assert code==0 and 'weights are in place' in out and 'timm.create_model' in out and not err
    assert (tmp_path/'out'/'model.safetensors').read_bytes()==(folders/name/'model.safetensors').read_bytes() and (tmp_path/'out'/'config.json').read_text()==(folders/name/'config.json').read_text()

@pytest.mark.parametrize('args,message', [(('none.pth', 'beit', 'out'), 'there is no file none.pth'), (('f.pth', 'biet', 'out'), "did you mean 'beit'"), (('f.pth', 'mae', 'out'), 'It looks like beit or mcbeit'),
    (('f.pth', 'dalle', 'out'), 'unknown method'), (('f.pth', 'beit', 'out', '--format', 'onnx'), 'format must be timm or transformers'), (('f.pth', 'beit', 'out', '--size', '100'), '100'),
    (('f.pth', 'beit', 'out', '--format', 'transformers', '--size', '128'), '--size and --push go with --format timm'), (('s.pth', 'saim', 'out', '--format', 'transformers', '--heads', '4'), 'no class for SAIM')])
def test_convert_says_what_is_wrong(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path); torch.save(WEIGHTS['beit'], 'f.pth'); torch.save(WEIGHTS['saim'], 's.pth')
    code,out,err = command(monkeypatch, capsys, *args)
    assert code==1 and message in err and len(err.strip().splitlines())==1 and not Path('out').exists()

HOSTILE = [dict(mean='nan'), dict(std='0'), dict(std='-1'), dict(std='inf'), dict(mean='inf'), dict(heads='-3'), dict(heads='0'), dict(heads='5'), dict(heads='99999999999'), dict(size='0'), dict(size='-64'),
    dict(size='1000000'), dict(size='65536'), dict(size='30'), dict(push='nobody'), dict(push='a/b/c'), dict(push='../x'), dict(format='transformers', size='0')]

@pytest.mark.parametrize('flags', HOSTILE, ids=str)
def test_convert_with_odd_flags(tmp_path, monkeypatch, capsys, flags):
    "One sentence, fast, nothing left"
    monkeypatch.chdir(tmp_path); torch.save(WEIGHTS['mae'], 'f.pth')
    start = time.perf_counter()
    code,out,err = command(monkeypatch, capsys, 'f.pth', 'mae', 'out', *[w for k,v in flags.items() for w in (f'--{k}={v}',)])
    assert code==1 and len(err.strip().splitlines())==1 and time.perf_counter()-start<10
    assert [p.name for p in tmp_path.iterdir()]==['f.pth']

def test_convert_writes_nothing_over_what_it_reads(tmp_path, monkeypatch, capsys):
    save_encoder(create('mae'), tmp_path/'run'/'encoder'); torch.save(WEIGHTS['mae'], tmp_path/'f.pth')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    file = tmp_path/'run'/'encoder'/'model.safetensors'
    for source,out in ((file, tmp_path/'run'/'encoder'), (file, tmp_path/'run'/'encoder'/'new'), (tmp_path/'run', tmp_path/'run'/'encoder'), (tmp_path/'run', tmp_path/'run'/'encoder'/'x'), (tmp_path/'run', tmp_path/'run'),
                       (tmp_path/'f.pth', tmp_path), (tmp_path/'f.pth', tmp_path/'f.pth'), (file, file)):
        code,_,err = command(monkeypatch, capsys, source, 'mae', out)
        assert code==1 and len(err.strip().splitlines())==1, (source, out)
    assert before=={p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}

def test_push_without_a_network(folders, tmp_path, monkeypatch, capsys):
    "The folder is complete, and the sentence says how to go on"
    import socket
    def refuse(*args, **kw): raise OSError('Network is unreachable')
    monkeypatch.setattr(socket, 'create_connection', refuse); monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.chdir(tmp_path); torch.save(WEIGHTS['mae'], 'f.pth')
    code,out,err = command(monkeypatch, capsys, 'f.pth', 'mae', 'out', '--push', 'you/encoder')
    assert code==1 and 'out could not be uploaded to you/encoder' in err and 'push_to_hub' in err and len(err.strip().splitlines())==1
    assert (tmp_path/'out'/'model.safetensors').exists()

def test_push_without_the_package(tmp_path, monkeypatch, capsys):
    "Said before anything is read"
    from mim_nb import convert
    find = convert.importlib.util.find_spec
    monkeypatch.setattr(convert.importlib.util, 'find_spec', lambda name: None if name=='huggingface_hub' else find(name))
    code,_,err = command(monkeypatch, capsys, tmp_path/'none.pth', 'mae', tmp_path/'out', '--push', 'you/encoder')
    assert code==1 and 'pip install huggingface_hub' in err

def test_transformers_takes_squares(tmp_path):
    for kw in (dict(img_size=(28, 20)), dict(img_size=(28, 56), patch_size=(2, 4))):
        with pytest.raises(ValueError, match='square images and patches only'): save_transformers(create('mae', **kw), tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_convert_is_installed(): assert any('mim_convert=mim_nb.convert:mim_convert_cli' in l for l in (Path(__file__).parents[1]/'settings.ini').read_text().splitlines())

# Hugging Face

@pytest.mark.parametrize('name', ['beit', 'mcbeit', 'mae'])
def test_transformers_give_the_reference_s_numbers(models, tmp_path, name):
    transformers = pytest.importorskip('transformers', reason='transformers is an optional extra, and not installed here')
    f = FIX[name]; save_transformers(models[name], tmp_path/'out')
    cls = transformers.ViTMAEForPreTraining if name=='mae' else transformers.BeitForMaskedImageModeling
    m,info = cls.from_pretrained(tmp_path/'out', output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        if name=='mae':
            out = m.eval()(f['in/images'], noise=f['in/noise'])
            assert close(out.logits, f['out/pred']) and abs(out.loss.item()-json.loads((PARITY/'mae_a.json').read_text())['scalars']['loss'])<1e-5
        else:
            logits = m.eval()(f['in/images'], bool_masked_pos=f['in/bool_masked_pos']).logits
            assert close(logits[f['in/bool_masked_pos']], f['out/logits_masked']) if name=='beit' else close(logits, f['out/logits_all'])
    p = transformers.AutoImageProcessor.from_pretrained(tmp_path/'out')
    assert list(p.image_mean)==[0.]*3 and p.size['height']==64

def test_transformers_with_tables_per_layer(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is an optional extra, and not installed here')
    own = create('beit', shared_bias=False, tokenizer=DVAE()).eval()
    for b in own.encoder.blocks: torch.nn.init.normal_(b.attn.relative_position_bias_table)
    save_transformers(own, tmp_path/'out'); m = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path/'out').eval()
    x,mask = torch.rand(2,1,28,28),own.sample_mask(2)
    with torch.no_grad(): assert close(m(own.normalize(x), bool_masked_pos=mask).logits[mask], own(x, mask).pred)

def test_transformers_names_are_complete(models, tmp_path):
    "Without transformers: every weight gets a name, all different, and together they have as many numbers"
    for name in ('beit', 'mcbeit', 'mae'):
        save_transformers(models[name], tmp_path/name); out = load_file(tmp_path/name/'model.safetensors')
        fixed = models[name].decoder.pos_embed.numel() if name=='mae' else 0
        assert sum(v.numel() for v in out.values())==sum(v.numel() for v in models[name].state_dict().values())+fixed
    for name in ('deepmim', 'saim', 'mixmim'):
        with pytest.raises(ValueError, match='transformers has no class for'): save_transformers(models[name], tmp_path/name)

def test_push_to_hub(folders, models, tmp_path, monkeypatch):
    "What timm would upload, without a network: a folder that loads again and gives the same features"
    from timm.models import _hub
    import shutil
    class Api:
        def __init__(self, **kw): pass
        def create_repo(self, repo_id, **kw): return types.SimpleNamespace(repo_id=repo_id)
        def file_exists(self, **kw): return False
        def upload_folder(self, folder_path, repo_id, **kw): shutil.copytree(folder_path, tmp_path/'hub'); return f'uploaded to {repo_id}'
    monkeypatch.setattr(_hub, 'HfApi', Api)
    for n in ('create_repo', 'upload_folder'): monkeypatch.setattr(_hub, n, getattr(Api(), n), raising=False)
    assert 'you/encoder' in str(push_to_hub(folders/'mae', 'you/encoder'))
    assert {'config.json', 'model.safetensors', 'README.md'}=={f.name for f in (tmp_path/'hub').iterdir()}
    m = timm.create_model(f"local-dir:{tmp_path/'hub'}", pretrained=True).eval()
    with torch.no_grad(): assert close(m.forward_features(FIX['mae']['in/images']), models['mae'].encoder.forward_features(FIX['mae']['in/images']))
    assert list(m.pretrained_cfg['mean'])==[0.]*3

# Round trips

@pytest.mark.parametrize('name', methods)
def test_timms_fine_tuning(folders, name):
    "The model part of timm's train.py with the documented arguments: create_model, create_optimizer_v2, its schedule, a few steps"
    torch.manual_seed(0)
    m = timm.create_model(f'local-dir:{folders/name}', pretrained=True, in_chans=3, num_classes=10, drop_rate=0., drop_path_rate=.1, global_pool='avg')
    assert m.num_classes==10 and sum(p.requires_grad for p in m.parameters())>10
    opt = create_optimizer_v2(m, opt='adamw', lr=1e-3, weight_decay=.05, layer_decay=.65)
    scales = [g['lr_scale'] for g in opt.param_groups]
    assert max(scales)==1 and min(scales)<.3
    schedule = CosineLRScheduler(opt, t_initial=10); schedule.step_update(0)
    x,y,losses = torch.rand(8,3,64,64),torch.arange(8),[]
    for i in range(6):
        opt.zero_grad(); loss = torch.nn.functional.cross_entropy(m(x), y); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1]<losses[0]

def test_timms_beit_goes_on_pretraining(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model('beit_base_patch16_224', img_size=28, patch_size=4, in_chans=1, embed_dim=96, depth=4, num_heads=3).eval()
    for b in theirs.blocks: torch.nn.init.normal_(b.attn.relative_position_bias_table)
    m = quiet('beit', theirs.state_dict(), vocab_size=256, tokenizer=DVAE())
    x = torch.rand(4,1,28,28)
    with torch.no_grad(): a,b = (e.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0] for e in (m.encoder, theirs))
    assert close(a, b) and (m.grid, m.head.out_features)==((7,7), 256)
    m.train()(x).loss.backward()
    assert all(p.grad is not None for n,p in m.named_parameters() if not n.startswith('tokenizer'))
    save_encoder(m.eval(), tmp_path/'e'); home = timm.create_model(f"local-dir:{tmp_path/'e'}", pretrained=True).eval()
    with torch.no_grad(): assert close(home.forward_features(x), m.encoder.forward_features(x))

def test_an_exported_encoder_comes_back(folders, models):
    "local-dir folders are files of the encoder-only kind"
    for name in ('beit', 'mae', 'deepmim'):
        m = quiet(name, folders/name/'model.safetensors', **{k: v for k,v in ARGS[name].items() if k!='decoder_heads'})
        x = torch.rand(2,3,64,64)
        with torch.no_grad(): assert close(m.encoder.forward_features(x), models[name].encoder.forward_features(x))

def test_parts_are_joined_in_order():
    cls = types.SimpleNamespace(official=[(rf'(.*)\.{c}', rf'\1.qkv[{i}]') for i,c in enumerate('qkv')])
    out = translate(cls, {f'a.{c}': torch.full((1,2), float(i)) for i,c in enumerate('vkq')})
    assert out['a.qkv'].tolist()==[[2,2],[1,1],[0,0]]
