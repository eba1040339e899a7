"The ruler: formulas against the counter, fit's own step, no questions to the device, schedules, mistakes"
import json, sys
from functools import cache
import pytest, torch
from pathlib import Path
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from mim_nb import benchmark as bm, flops, timing
from mim_nb.benchmark import benchmark_method as benchmark, mim_benchmark, mim_benchmark_cli, table_header, table_row, usual_sizes
from mim_nb.images import ImageSet, batches
from mim_nb.flops import (counted_flops, fresh, gpu_days, hidden_patches, paper_schedule, schedule_in_words,
    silent_step, step_flops, untrained_tokenizers)
from mim_nb.methods import create, methods
from mim_nb.step import Step
from mim_nb.timing import Marks, matmul_rate, recipe_step, step_parts, time_steps
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
    n = {t: counted_flops(fresh('beit', 'base', 'meta', t)) for t in untrained_tokenizers}
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
    m = fresh(method)
    x,mask = torch.rand(4, 1, 28, 28),m.sample_mask(4)
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
    with Questions() as q: m(torch.rand(4,1,28,28), m.sample_mask(4).hidden)       # a mask from elsewhere is looked at
    assert q.asked

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('method', methods)
def test_no_step_waits_for_the_gpu(method):
    device = torch.device('cuda')
    step = recipe_step(fresh(method, device=device), methods[method].recipes['tiny'], device)
    images = torch.randint(0, 256, (8,1,28,28), dtype=torch.uint8, device=device)
    labels = torch.zeros(8, dtype=torch.long, device=device)
    step(0, images, labels)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        step(1, images, labels)
    finally: torch.cuda.set_sync_debug_mode('default')

def test_masks_from_elsewhere_are_checked():
    "A mask or an order that was drawn and then spoilt is found out, as if it had been made by hand"
    x = torch.rand(2,1,28,28)
    m = create('mae')
    mask = m.sample_mask(2).tensor
    mask[0] = ~mask[0]
    with pytest.raises(ValueError): m(x, mask)
    m = create('saim')
    order = m.sample_mask(2).tensor
    order[0,0] = order[0,1]
    with pytest.raises(ValueError, match='exactly once'): m(x, order)

# The step
@pytest.mark.parametrize('method', methods)
def test_it_is_the_step_of_fit(method):
    recipe,out = dict(lr=1e-3, weight_decay=.05, betas=(.9,.99), clip=3.),[]
    for ours in (True, False):
        torch.manual_seed(0); m = fresh(method)
        data = ImageSet(torch.randint(0, 256, (16,1,28,28), dtype=torch.uint8))
        if ours:
            step,stream = recipe_step(m, recipe, CPU),batches(data, 8)
            for i in range(2): step(i, *next(stream))
        else: fit(m, data, epochs=1, batch_size=8, warmup_epochs=0, min_lr=1e-3, **recipe, device='cpu', bar=False)
        out.append(m.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(out[0].values(), out[1].values()))

def test_a_row_adds_up():
    r = benchmark('deepmim', batch=4, steps=1, rate=RATE)
    assert r['peak_memory'] is None and ' - ' in table_row(r) and r['images_per_second']>0 and abs(sum(r['ms'][p] for p in step_parts)-r['ms']['step'])<1e-6
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

# The clock
class FakeEvent:
    "An event of a machine with two cards: it remembers on which card and in which queue it was recorded"
    made = []
    def __init__(self, enable_timing): FakeEvent.made.append(self)
    def record(self, stream=None): self.stream = stream
    def elapsed_time(self, other): return 2.

def test_the_card_that_works_is_timed(monkeypatch):
    "With `--device cuda:1` the first card's queue is empty, and its events would measure nothing"
    inside,waited = [],[]
    class On:
        def __init__(self, device): self.device = device
        def __enter__(self): inside.append(self.device)
        def __exit__(self, *_): pass
    monkeypatch.setattr(torch.cuda, 'Event', FakeEvent)
    monkeypatch.setattr(torch.cuda, 'device', On)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: ('queue', device))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device=None: waited.append(device))
    second = torch.device('cuda:1')
    mark = Marks(second)
    for _ in range(3): mark()
    assert mark.ms()==[2., 2.]
    assert inside==[second]*3 and waited==[second]
    assert [e.stream for e in FakeEvent.made]==[('queue', second)]*3

def test_windows_and_parts():
    "Each part gets its own time, the median window counts, and warming up counts nothing"
    m = fresh('mae')
    step = recipe_step(m, dict(lr=1e-3, weight_decay=.05, betas=(.9,.99), clip=None), CPU)
    assert isinstance(step, Step) and step.clip==float('inf')
    seen = []
    class Timed:
        "Five marks a step, each after as many ticks as it has number"
        def __init__(self): self.m = m
        def __call__(self, i, images, labels, mark=lambda: None):
            seen.append(i)
            for k in range(5):
                now[0] += (k+1)*(10 if i in (3,4) else 1)
                mark()
    now = [0]
    stream = iter([(None, None)]*9)
    ms = time_steps(Timed(), stream, steps=2, windows=3, warmup=1, clock=lambda: now[0]/1e3)
    assert seen==list(range(7)) and ms==pytest.approx(dict(zip(step_parts, (1,2,3,4,5))))

# Bad input
def measuring(*args, **kwargs): raise AssertionError('something was measured')

@pytest.mark.parametrize('args,says', [(['biet'], "did you mean 'beit'"), (['beit,sain'], "did you mean 'saim'"), (['--preset', 'bse'], "did you mean 'base'"), (['saim', '--preset', 'huge'], "unknown preset of saim 'huge'"),
    (['mae', '--batch', '0'], 'batch must be a whole number of at least 1'), (['mae', '--steps', '0'], 'steps must be a whole number of at least 1'), (['mixmim', '--batch', '3', '--steps', '1'], 'even number'), (['--out', 'nowhere/s.json'], 'no folder nowhere'),
    (['--tokenizer', 'dale'], "did you mean 'dalle'"), (['--data', 'no_such'], 'no data called'), (['--device', 'gpu'], 'unknown device')])
def test_mistakes_get_one_sentence(monkeypatch, capsys, args, says):
    code,_,err = command(monkeypatch, capsys, *([] if '--device' in args else ['--device', 'cpu']), *args) if args[0].startswith('-') else command(monkeypatch, capsys, *args, '--device', 'cpu')
    assert code==1 and says in err and len(err.splitlines())==1 and err.startswith('mim_benchmark: ')

@pytest.mark.parametrize('args,says', [(['--batch', '-1'], 'batch must be'), (['--steps', '-3'], 'steps must be'), (['--workers', '-1'], 'workers must be'),
    (['--data', ''], '--data is an empty text'), (['--out', ''], '--out is an empty text'), (['--preset', ''], "unknown preset of mae ''"), (['--preset', 'tiny,'], "unknown preset of mae ''"),
    (['--tokenizer', 'dale'], "did you mean 'dalle'"), (['--data', 'no_such'], 'no data called'), (['--data', 'fashion_mnist', '--batch', '100000'], 'cannot be filled'),
    (['--batch', '9999999999'], 'batch must be'), (['--out', '.'], 'was not written by mim_benchmark'), (['--methods', ''], "unknown method ''")])
def test_nothing_is_measured_before_everything_is_checked(monkeypatch, capsys, args, says):
    for name in ('try_row', 'matmul_rate'): monkeypatch.setattr(bm, name, measuring)
    monkeypatch.setattr(sys, 'argv', ['mim_benchmark', '--device', 'cpu', *(['--methods', 'mae'] if '--methods' not in args else []), *args])
    code = mim_benchmark_cli()
    err = capsys.readouterr().err.strip()
    assert code==1 and says in err and len(err.splitlines())==1

@pytest.mark.parametrize('content', ['my notes', '[1, 2]', '{"rows": []}', '{"made_by": "mim_evaluate"}', ''])
def test_a_foreign_file_is_not_overwritten(monkeypatch, content, tmp_path):
    for name in ('try_row', 'matmul_rate'): monkeypatch.setattr(bm, name, measuring)
    file = tmp_path/'speed.json'
    file.write_text(content)
    with pytest.raises(FileExistsError, match='was not written by mim_benchmark'): mim_benchmark('mae', device='cpu', out=str(file))
    assert file.read_text()==content

def test_an_earlier_result_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(bm, 'matmul_rate', lambda *a,**k: RATE)
    file = tmp_path/'speed.json'
    for batch in (2, 4): mim_benchmark('mae', batch=batch, steps=1, device='cpu', out=str(file))
    o = json.loads(file.read_text())
    assert o['made_by']=='mim_benchmark' and o['rows'][0]['batch']==4 and o['settings']['batch']==4
    assert not list(tmp_path.glob('.mim_nb-*'))

def test_names_tell_what_things_are():
    "No module of the package exports these names that say nothing"
    exported = {n for m in (bm, flops, timing) for n in m.__all__}
    assert not exported & {'parts', 'line', 'header', 'defaults', 'schedule', 'tokenizers', 'say_schedule', 'dtype_of', 'something_to_crop', 'Step'}
    assert usual_sizes['cpu']['tiny'] and len(table_header())>len('method') and step_parts[0]=='data'

def test_too_little_memory(monkeypatch, capsys):
    def full(*args, **kw): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
    monkeypatch.setattr(bm, 'time_steps', full)
    code,_,err = command(monkeypatch, capsys, 'mae', '--device', 'cpu')
    assert code==1 and 'smaller --batch' in err and '--checkpointing' in err and len(err.splitlines())==1

def test_compiled_beside_eager(monkeypatch, capsys):
    "With a compiler that only traces; one that fails is said, and the row left out"
    compile = torch.compile
    def only_traced(f, **kw): return compile(f, backend='eager')
    monkeypatch.setattr(torch, 'compile', only_traced)
    torch._dynamo.reset()
    code,out,_ = command(monkeypatch, capsys, 'mixmim', '--batch', '2', '--steps', '1', '--device', 'cpu', '--compile')
    assert code==0 and 'mixmim* ' in out and 'mixmim ' in out
    def fails(gm, inputs): raise RuntimeError('no compiler')
    def broken(f, **kw): return compile(f, backend=fails)
    monkeypatch.setattr(torch, 'compile', broken)
    torch._dynamo.reset()
    code,out,_ = command(monkeypatch, capsys, 'mixmim', '--batch', '2', '--steps', '1', '--device', 'cpu', '--compile')
    assert code==0 and 'mixmim* ' not in out and 'could not be compiled' in out and 'needs a C++ compiler' in out

# Recipes
@pytest.mark.parametrize('method,preset', papers)
def test_schedules_of_the_papers(method, preset, capsys):
    s,r = paper_schedule(method, preset),methods[method].recipes[preset]
    assert s['steps']==round(r['epochs']*(1281167//r['batch_size'])) and 0<s['warmup']<s['steps'] and s['lr']==r['lr'] and s['min_lr']==r['min_lr']
    if preset=='base':
        counts = json.loads((PARITY/f'fullsize_{method}.json').read_text())['counts']
        clip = dict(feature_dim=512) if method=='deepmim' else {}                     # their published DeepMIM predicts CLIP's features
        assert paper_schedule(method, preset, **clip)['parameters']==counts['trainable_parameters']
        assert (s['hidden'], s['patches'])==dict(beit=(75,196), mcbeit=(147,196), mae=(147,196), deepmim=(147,196), saim=(196,196), mixmim=(24,49))[method]
    print(schedule_in_words(s))
    assert f"{s['steps']:,} steps" in capsys.readouterr().out

def test_cost():
    assert abs(gpu_days(148.29, 'beit')-80)<.1                       # 800 epochs took BEiT's authors about five days on 16 cards
    assert gpu_days(200, 'mae')==.5*gpu_days(100, 'mae') and gpu_days(100, 'mae', images=1000)<gpu_days(100, 'mae')
    with pytest.raises(ValueError, match='greater than 0'): gpu_days(0, 'mae')
    with pytest.raises(ValueError, match='cannot be filled'): paper_schedule('mae', images=100)
