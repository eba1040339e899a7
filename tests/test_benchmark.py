"The ruler: formulas against the counter, a step that is fit's, no questions to the device, schedules, mistakes"
import json, sys
from functools import cache
import pytest, torch
from pathlib import Path
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from mim_nb import benchmark as bm
from mim_nb.benchmark import Step, benchmark, counted_flops, fresh, gpu_days, hidden_patches, line, matmul_rate, mim_benchmark, mim_benchmark_cli, say_schedule, schedule, silent_step, step_flops
from mim_nb.data import ImageSet, batches
from mim_nb.masks import block_mask, note, noted, places, random_mask, random_order
from mim_nb.methods import create, methods
from mim_nb.train import fit

PARITY = Path(__file__).parent/'parity'
RATE = dict(dtype='float32', size=8, flops_per_second=1e10)
CPU = torch.device('cpu')
small = [(k, p) for p in ('tiny','small','base') for k in methods]
papers = [(k, p) for k in methods for p in methods[k].presets if p not in ('tiny','small')]
shape = cache(lambda method,preset: fresh(method, preset, 'meta'))

@pytest.mark.parametrize('method,preset', small)
def test_formula_and_counter_agree(method, preset):
    m = shape(method, preset); counted = counted_flops(m)['model']
    assert abs(step_flops(method, m)/counted-1)<.005                   # 5% were asked for

@pytest.mark.parametrize('method,kw', [('mae', dict(mask_ratio=.5)), ('mae', dict(decoder_depth=0)), ('deepmim', dict(taps=[4])), ('saim', dict(query_depth=4)), ('saim', dict(share_weight=True)),
    ('mixmim', dict(img_size=56)), ('mixmim', dict(depths=(1,1,1), num_heads=(2,2,2), img_size=32, window=None)), ('beit', dict(img_size=56, in_chans=3)), ('mcbeit', dict(detach=True, mask_ratio=.4))])
def test_formula_follows_the_settings(method, kw):
    m = fresh(method, 'tiny', 'meta', **kw)
    assert abs(step_flops(method, m)/counted_flops(m)['model']-1)<.03

def test_the_counter_counts_nothing_twice():
    "The loss of mc-BEiT computes its similarities once more when it goes backward: that is no work for the model"
    m = shape('mcbeit', 'tiny'); L,V = m.num_patches,m.head.out_features
    assert abs(step_flops('mcbeit', m)-counted_flops(m)['model'])<.5*2*hidden_patches(m)*L*V

def test_tokenizers_are_counted_apart():
    n = {t: counted_flops(fresh('beit', 'base', 'meta', t)) for t in bm.tokenizers}
    assert n['dvae']['target']<n['vqgan']['target']<n['dalle']['target']
    assert abs(n['dalle']['model']/n['dvae']['model']-1)<1e-3
    with pytest.raises(ValueError, match="did you mean 'dalle'"): fresh('beit', tokenizer='dale')

# No questions to the device
@pytest.mark.parametrize('method', methods)
def test_no_step_asks_the_device(method): silent_step(shape(method, 'tiny'))

class Questions(TorchDispatchMode):
    "Names of operations whose answer the host has to wait for"
    asking = {'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::equal', 'aten::is_nonzero', 'aten::_unique2', 'aten::repeat_interleave'}
    def __init__(self): super().__init__(); self.asked = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name,index = func._schema.name,args[1] if len(args)>1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = name.startswith('aten::index') and any(torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in index)
        if name in self.asking or by_mask: self.asked.append(name)
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('method', methods)
def test_no_question_is_seen_on_a_cpu_either(method):
    "The same with real numbers, where BEiT's blocks are drawn beforehand, as they are drawn on the CPU for any device"
    m = fresh(method); x = torch.rand(4, 1, 28, 28); mask = m.sample_mask(4)
    if method=='beit': mask = note(mask, places(mask))
    with Questions() as q:
        out = m(x, mask); out.loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 3.)
    assert q.asked==[]

def test_the_questions_would_be_seen():
    x,mask = torch.rand(2,4),torch.tensor([True,False,True,False]).expand(2,4)
    for ask in (lambda: x[mask], lambda: x.sum().item(), lambda: bool(mask.any()), lambda: x.masked_select(mask), lambda: torch.equal(x, x)):
        with Questions() as q: ask()
        assert q.asked
    m = fresh('mae')
    with Questions() as q: m(torch.rand(4,1,28,28), m.sample_mask(4).clone())      # a mask from elsewhere is looked at
    assert q.asked

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('method', methods)
def test_no_step_waits_for_the_gpu(method):
    device = torch.device('cuda')
    step = Step(fresh(method, device=device), methods[method].recipes['tiny'], device)
    stream = iter([(torch.randint(0, 256, (8,1,28,28), dtype=torch.uint8, device=device), None)]*3)
    step(0, stream, lambda: None); torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        step(1, stream, lambda: None)
    finally: torch.cuda.set_sync_debug_mode('default')

def same(a, b): return torch.equal(a.hidden, b.hidden) and torch.equal(a.shown, b.shown) and a.counts==b.counts

def test_notes_of_masks():
    for m in (random_mask(5, 49, .75), random_mask(3, 196, .4)): assert noted(m) and same(noted(m), places(m.clone()))
    m = random_mask(5, 49, .75); m[2,:4] = True
    assert noted(m) is None and same(places(m), places(m.clone()))
    assert noted(random_order(2, 9)) and noted(random_order(2, 9).clone()) is None
    with torch.inference_mode(): m = random_mask(2, 49, .75); m[0] = ~m[0]; assert places(m).counts==[12,37]
    m = block_mask(4, 7, 19, 4, device='meta')
    assert len(places(m).hidden)==sum(places(m).counts) and len(places(m).hidden)+len(places(m).shown)==4*49
    torch.manual_seed(0); a = block_mask(4, 7, 19, 4)
    torch.manual_seed(0); assert places(block_mask(4, 7, 19, 4, device='meta')).counts==a.sum(1).tolist()

def test_changed_masks_are_not_believed():
    "A mask or an order that was drawn and then spoilt is found out, as if it had been made by hand"
    x = torch.rand(2,1,28,28)
    m = create('mae'); mask = m.sample_mask(2); mask[0] = ~mask[0]
    with pytest.raises(ValueError, match='same number of patches'): m(x, mask)
    m = create('saim'); order = m.sample_mask(2); order[0,0] = order[0,1]
    with pytest.raises(ValueError, match='exactly once'): m(x, order)

# The step
@pytest.mark.parametrize('method', methods)
def test_it_is_the_step_of_fit(method):
    recipe,out = dict(lr=1e-3, weight_decay=.05, betas=(.9,.99), clip=3.),[]
    for ours in (True, False):
        torch.manual_seed(0); m = fresh(method)
        data = ImageSet(torch.randint(0, 256, (16,1,28,28), dtype=torch.uint8))
        if ours:
            step,stream = Step(m, recipe, CPU),batches(data, 8)
            for i in range(2): step(i, stream, lambda: None)
        else: fit(m, data, epochs=1, batch_size=8, warmup_epochs=0, min_lr=1e-3, **recipe, device='cpu', bar=False)
        out.append(m.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(out[0].values(), out[1].values()))

def test_a_row_adds_up():
    r = benchmark('deepmim', batch=4, steps=1, rate=RATE)
    assert r['peak_memory'] is None and ' - ' in line(r) and r['images_per_second']>0 and abs(sum(r['ms'][p] for p in bm.parts)-r['ms']['step'])<1e-6
    assert abs(r['utilisation']-r['flops']['formula']*r['images_per_second']/1e10)<1e-9 and r['utilisation']<r['utilisation_apart']

def test_matmul_rate():
    r = matmul_rate(CPU, sizes=(64,128), repeats=2)
    assert r['dtype']=='float32' and r['size'] in (64,128) and r['flops_per_second']>1e7

def command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['mim_benchmark', *args]); monkeypatch.setattr(bm, 'matmul_rate', lambda *a,**k: RATE)
    code = mim_benchmark_cli(); out,err = capsys.readouterr()
    return code,out,err.strip()

def test_command(monkeypatch, capsys, tmp_path):
    code,out,err = command(monkeypatch, capsys, 'mae,mixmim', '--batch', '4', '--steps', '1', '--device', 'cpu', '--data', 'fashion_mnist', '--out', str(tmp_path/'s.json'))
    assert code==0 and 'loader alone' in out
    o = json.loads((tmp_path/'s.json').read_text())
    assert [r['method'] for r in o['rows']]==['mae','mixmim'] and {'device','python','torch','timm'}<=o['machine'].keys() and o['matmul']==RATE
    assert all(r['loader_images_per_second']>0 for r in o['rows']) and str(tmp_path) not in json.dumps(o)

@pytest.mark.parametrize('args,says', [(['biet'], "did you mean 'beit'"), (['beit,sain'], "did you mean 'saim'"), (['--preset', 'bse'], "did you mean 'base'"), (['saim', '--preset', 'huge'], "unknown preset of saim 'huge'"),
    (['mae', '--batch', '0'], 'at least 1 image'), (['mae', '--steps', '0'], 'at least 1 step'), (['mixmim', '--batch', '3', '--steps', '1'], 'even number'), (['--out', 'nowhere/s.json'], 'no folder nowhere'),
    (['--tokenizer', 'dale'], "did you mean 'dalle'"), (['--data', 'no_such'], 'no data called'), (['--device', 'gpu'], 'unknown device')])
def test_mistakes_get_one_sentence(monkeypatch, capsys, args, says):
    code,_,err = command(monkeypatch, capsys, *([] if '--device' in args else ['--device', 'cpu']), *args) if args[0].startswith('-') else command(monkeypatch, capsys, *args, '--device', 'cpu')
    assert code==1 and says in err and len(err.splitlines())==1 and err.startswith('mim_benchmark: ')

def test_too_little_memory(monkeypatch, capsys):
    def full(*args, **kw): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
    monkeypatch.setattr(bm, 'time_steps', full)
    code,_,err = command(monkeypatch, capsys, 'mae', '--device', 'cpu')
    assert code==1 and 'smaller --batch' in err and '--checkpointing' in err and len(err.splitlines())==1

def test_compiled_beside_eager(monkeypatch, capsys):
    "With a compiler that only traces; one that fails is said, and the row left out"
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: compile(f, backend='eager'))
    torch._dynamo.reset()
    code,out,_ = command(monkeypatch, capsys, 'mixmim', '--batch', '2', '--steps', '1', '--device', 'cpu', '--compile')
    assert code==0 and 'mixmim* ' in out and 'mixmim ' in out
    def fails(gm, inputs): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', lambda f: compile(f, backend=fails))
    torch._dynamo.reset()
    code,out,_ = command(monkeypatch, capsys, 'mixmim', '--batch', '2', '--steps', '1', '--device', 'cpu', '--compile')
    assert code==0 and 'mixmim* ' not in out and 'could not be compiled' in out and 'needs a C++ compiler' in out

# Recipes
@pytest.mark.parametrize('method,preset', papers)
def test_schedules_of_the_papers(method, preset, capsys):
    s,r = schedule(method, preset),methods[method].recipes[preset]
    assert s['steps']==round(r['epochs']*(1281167//r['batch_size'])) and 0<s['warmup']<s['steps'] and s['lr']==r['lr'] and s['min_lr']==r['min_lr']
    if preset=='base':
        counts = json.loads((PARITY/f'fullsize_{method}.json').read_text())['counts']
        clip = dict(feature_dim=512) if method=='deepmim' else {}                     # their published DeepMIM predicts CLIP's features
        assert schedule(method, preset, **clip)['parameters']==counts['trainable_parameters']
        assert (s['hidden'], s['patches'])==dict(beit=(75,196), mcbeit=(147,196), mae=(147,196), deepmim=(147,196), saim=(196,196), mixmim=(24,49))[method]
    print(say_schedule(s))
    assert f"{s['steps']:,} steps" in capsys.readouterr().out

def test_cost():
    assert abs(gpu_days(148.29, 'beit')-80)<.1                       # 800 epochs took BEiT's authors about five days on 16 cards
    assert gpu_days(200, 'mae')==.5*gpu_days(100, 'mae') and gpu_days(100, 'mae', images=1000)<gpu_days(100, 'mae')
    with pytest.raises(ValueError, match='greater than 0'): gpu_days(0, 'mae')
    with pytest.raises(ValueError, match='cannot be filled'): schedule('mae', images=100)
