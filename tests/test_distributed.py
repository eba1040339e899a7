"""Two processes against one. `torchrun` starts this very file twice, once for all tests: each process works through `suite`,
then one of them is killed in the middle of a run, and both are started again"""
import os, signal, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
from PIL import Image
from mim_nb.augment import Augment
from mim_nb.data import ImageSet
from mim_nb.masks import random_mask
from mim_nb.methods import create
from mim_nb.pretrain import mim_pretrain, mim_pretrain_cli
from mim_nb.finetune import finetune
from mim_nb.ranks import get_device, in_turn, mean_over_ranks, on_first, slices, together
from mim_nb.runlog import RunLog
from mim_nb.tokenizers import DVAE
from mim_nb.runs import Stopped, load_ckpt, read_log
from mim_nb.train import fit

G = torch.Generator().manual_seed(0)
DATA = ImageSet(torch.randint(0, 256, (32,1,16,16), generator=G).to(torch.uint8), torch.arange(32))      # a label is the image's number
LABELLED = ImageSet(DATA.images, torch.arange(32)%4)
MASKS,ORDERS = random_mask(32, 16, .5, G),torch.rand(32, 16, generator=G).argsort(1)
SMALL = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=16)
SIZES = dict(beit=dict(depth=2, vocab_size=8), mcbeit=dict(depth=2, vocab_size=8), mae=dict(depth=2, decoder_dim=16, decoder_depth=1),
             deepmim=dict(depth=2, decoder_dim=16), saim=dict(depth=2, query_depth=1), mixmim=dict(patch_size=2, depths=(1,1), num_heads=(1,2), window=None, decoder_dim=16, decoder_depth=1))
KW = dict(epochs=5, batch_size=8, lr=3e-4, device='cpu', bar=False)
PRETRAIN = dict(data='flat', epochs=4, batch=8, size=16, device='cpu')

def method(name, drop_path=.2):
    torch.manual_seed(1)
    if name=='dvae': return DVAE(16, 4, 1, 8, width=16, depth=1)
    m = create(name, 'tiny', **{**SMALL, 'num_heads': 1, 'drop_path': drop_path, **SIZES[name]})
    if name in ('beit', 'mcbeit'): m.set_tokenizer(DVAE(16, 4, 1, 8, width=16, depth=1))
    return m

def train(name, **kw):
    m = method(name, .2 if kw.get('forward') is not with_masks else 0.)
    rows = fit(m, DATA, **{**KW, 'augment': Augment(16, jitter=.3), **kw})
    return m.state_dict(),rows

def plain(name, **kw):
    """With steps as long as the gradients: Adam would make long steps of rounding, where a gradient should be 0, as a key's bias has it"""
    return train(name, optimizer=lambda m: torch.optim.SGD(m.parameters()), lr=.03, **kw)

def masked(name, **kw):
    "Nothing is left to chance: masks that belong to images, no crops, no dropped paths"
    return plain(name, forward=with_masks, augment=None, **kw)

def with_masks(m, x, y): return m(x, (ORDERS if type(m).__name__=='SAIM' else MASKS)[y])

def error(f, *kinds):
    "What `f` raises, as text"
    try: f()
    except kinds as e: return f'{type(e).__name__}: {e}'

class Cut(Exception): pass

def cut_at(step, then):
    "A `forward` that does something bad before one of the steps"
    n = 0
    def forward(m, x, y):
        nonlocal n; n += 1
        out = m(x)
        return then(out) if n==step+1 else out
    return forward

def sloped(out):
    "A fine loss with a gradient that is NaN"
    return out._replace(loss=out.loss + (out.pred.sum()*0).sqrt())

def resumed_with(**kw):
    "Two processes go on with what two processes began, in another way"
    return train('mae', folder='cut', resume=True, save_every=3, augment=Augment(16), **kw)

def broken(out): return out._replace(loss=out.loss*float('inf'))
def usr1(out): os.kill(os.getpid(), signal.SIGUSR1); return out
def cut(out): raise Cut

def resumed(rank):
    "Stopped by a power cut in the middle of an epoch, then resumed: are the bits those of a run that nobody disturbed?"
    kw = dict(save_every=3, augment=Augment(16))
    error(lambda: train('mae', folder='cut', forward=cut_at(10, cut), **kw), Cut)
    on_first(lambda: None)
    a,b = train('mae', folder='cut', resume=True, **kw)[0],train('mae', **kw)[0]
    return all(torch.equal(a[k], b[k]) for k in a)

def suite(rank):
    "What two processes have to say: name -> anything that can be saved"
    for n in ('own', 'stop'): Path(f'{n}{rank}').mkdir()
    on_first(lambda: Path('cut').mkdir())
    found = {f'weights {n}': train(n)[0] for n in (*SIZES, 'dvae')}
    found |= {f'masks {n}': masked(n)[0] for n in SIZES if n!='mixmim'}
    found['turns'],found['rows'] = plain('mae', accumulate=2, folder=f'own{rank}')
    found['files'] = {p.name for p in Path(f'own{rank}').iterdir()}
    found['resumed'] = resumed(rank)
    found['disagree'] = error(lambda: train('mae', lr=.1*(rank+1)), ValueError)
    found['divide'] = error(lambda: train('mae', batch_size=7), ValueError)
    found['broken'] = error(lambda: train('mae', forward=cut_at(5, broken if rank else lambda o: o)), FloatingPointError)
    found['stopped'] = error(lambda: train('mae', folder=f'stop{rank}', forward=cut_at(5, usr1 if rank else lambda o: o)), Stopped)
    found['mean'],found['first'],found['turn'] = mean_over_ranks(torch.tensor([1.+rank])),on_first(lambda: rank),in_turn(lambda: rank)
    found['slices'] = slices(24, 3)
    Path(f'bad{rank}').mkdir()
    found['others'] = error(lambda: resumed_with(accumulate=2), ValueError)
    found['gradient'] = error(lambda: train('mae', folder=f'bad{rank}', forward=cut_at(5, sloped if rank else lambda o: o)), FloatingPointError)
    found['ema'] = error(lambda: finetune(method('mae'), LABELLED, ema=.9, epochs=1, batch_size=8, augment={}, device='cpu', bar=False), RuntimeError)
    mim_pretrain('mae', out='whole', accumulate=2, **PRETRAIN)
    return found

def pretrain_and_die(rank):
    "Rank 1 is killed when the second checkpoint is there; `torchrun` starts both again, with the same command"
    real = RunLog.write
    def write(log, *args, **row):
        if rank==1 and row['step']>=10 and os.environ['TORCHELASTIC_RESTART_COUNT']=='0': os.kill(os.getpid(), signal.SIGKILL)
        return real(log, *args, **row)
    RunLog.write = write
    sys.argv = ['mim_pretrain', 'mae', '--out', 'killed', '--accumulate', '2', *(str(o) for k,v in PRETRAIN.items() for o in (f'--{k}', v))]
    sys.exit(mim_pretrain_cli())

if __name__=='__main__':
    torch.set_num_threads(1)
    rank = int(os.environ['RANK'])
    with together('cpu') if os.environ['TORCHELASTIC_RESTART_COUNT']=='0' else nullcontext():
        if not Path('killed').exists(): torch.save(suite(rank), f'found{rank}.pt')
        pretrain_and_die(rank)

# ---- the tests proper, in one process

def torchrun(cwd, *args):
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *map(str, args)]
    return subprocess.run(cmd, cwd=cwd, env=os.environ|dict(OMP_NUM_THREADS='1', MPLBACKEND='agg'), capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What both processes found, and the folder they worked in"
    cwd = tmp_path_factory.mktemp('two'); (cwd/'flat').mkdir()
    for i in range(40): Image.fromarray(torch.randint(0, 256, (16,16), generator=G).to(torch.uint8).numpy()).save(cwd/'flat'/f'{i}.png')
    r = torchrun(cwd, '--max-restarts', 1, __file__)
    assert r.returncode==0, r.stdout[-3000:]+r.stderr[-5000:]
    return [torch.load(cwd/f'found{k}.pt', weights_only=False) for k in (0,1)],cwd,r

def off(a, b): return max((a[k]-b[k]).abs().max().item() for k in b if b[k].is_floating_point())

@pytest.mark.parametrize('name', [*SIZES, 'dvae'])
def test_two_processes_are_one_in_two_turns(two, name):
    (a,b),_,_ = two
    one,_ = train(name, accumulate=2)
    assert off(a[f'weights {name}'], one)<1e-5 and off(a[f'weights {name}'], b[f'weights {name}'])==0
    assert off(one, method(name).state_dict())>1e-3

@pytest.mark.parametrize('name', [n for n in SIZES if n!='mixmim'])
def test_with_given_masks_two_processes_are_one(two, name):
    one,_ = masked(name)
    assert off(one, method(name).state_dict())>1e-3
    assert off(two[0][0][f'masks {name}'], one)<1e-5

def test_four_turns_are_two_processes_of_two(two):
    one,rows = plain('mae', accumulate=4)
    (a,b),_,_ = two
    assert off(a['turns'], one)<1e-5
    for x,y,z in zip(rows, a['rows'], b['rows'], strict=True):
        assert x['step']==y['step'] and abs(x['loss']-y['loss'])<1e-4 and y['loss']==z['loss'] and 0<=y['waiting']<=1

def test_rank_0_alone_writes(two):
    (a,b),cwd,_ = two
    assert a['files']=={'log.jsonl', 'last.ckpt', 'previous.ckpt'} and b['files']==set()

def test_resumed_under_two_ranks_to_the_same_bits(two): assert all(f['resumed'] for f in two[0])

def test_what_all_ranks_say(two):
    for f in two[0]:
        assert f['disagree'].startswith('ValueError: rank 1 has lr=0.2 and rank 0 has 0.1')
        assert 'a batch of 7 images cannot be cut into 2 equal slices (2 processes × 1 turns): take a batch of 8' in f['divide']
        assert f['broken'].startswith('FloatingPointError: the loss became') and 'between steps 5 and 8' in f['broken']

def test_a_bad_gradient_on_one_rank_ends_all(two):
    for k,f in enumerate(two[0]):
        assert f['gradient'].startswith('FloatingPointError: the loss became nan between steps 5 and 8 (its gradient has the norm nan)')
        assert not (two[1]/f'bad{k}'/'last.ckpt').exists() or load_ckpt(two[1]/f'bad{k}')['step']==4

def test_another_way_of_cutting_a_step_is_refused(two):
    for f in two[0]: assert 'accumulate was 1 and is now 2' in f['others']

def test_other_processes_than_before_are_refused(two):
    with pytest.raises(ValueError, match='processes was 2 and is now 1'): train('mae', folder=two[1]/'cut', resume=True, augment=Augment(16))

def test_averaged_weights_beside_two_processes(two):
    for f in two[0]: assert f['ema'] is None

# ---- devices of several processes

@pytest.fixture
def launched(monkeypatch):
    "As if torchrun had started this process, on a machine with so many GPUs"
    def start(gpus, local=2, world=2):
        for k,v in dict(WORLD_SIZE=world, LOCAL_WORLD_SIZE=local, RANK=0, LOCAL_RANK=0).items(): monkeypatch.setenv(k, str(v))
        monkeypatch.setattr('torch.cuda.is_available', lambda: gpus>0)
        monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
        monkeypatch.setattr('torch.cuda.set_device', lambda d: None)
        monkeypatch.setattr('torch.backends.mps.is_available', lambda: False)
        monkeypatch.setattr('mim_nb.ranks._meet', lambda backend, timeout: 0)
        monkeypatch.setattr('torch.distributed.destroy_process_group', lambda: None)
    return start

def device(name):
    with together(name) as d: return d

@pytest.mark.parametrize('gpus,local,name,gets', [(0, 2, 'auto', 'cpu'), (0, 2, 'cpu', 'cpu'), (2, 2, 'auto', 'cuda:0'), (2, 2, 'cuda', 'cuda:0'), (2, 2, 'cpu', 'cpu'), (2, 1, 'cuda:1', 'cuda:1')])
def test_ranks_get_the_device_that_was_asked_for(launched, gpus, local, name, gets):
    launched(gpus, local)
    assert device(name)==gets

@pytest.mark.parametrize('gpus,name,said', [(0, 'cuda', '0 CUDA devices'), (0, 'cuda:1', '0 CUDA devices'), (0, 'mps', 'this machine has none'), (2, 'cuda:1', 'several processes cannot share'),
                                            (2, 'cuda:0', 'several processes cannot share'), (1, 'cuda:1', '1 CUDA devices'), (0, 'gpu', 'unknown device'), (2, 'xpu', 'unknown device')])
def test_or_a_sentence(launched, gpus, name, said):
    launched(gpus)
    with pytest.raises(ValueError, match=said) as e: device(name)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['gpu', 'meta', 'xpu', 'cuda:-1', None, 3.5, '', 'cuda:', 'cuda:9999999999999999999'])
def test_devices_that_are_none(name):
    with pytest.raises(ValueError) as e: get_device(name)
    assert '\n' not in str(e.value)

def test_a_signal_on_one_rank_stops_all(two):
    (a,b),cwd,_ = two
    for f in (a,b): assert 'Stopped: stopped at step 8 of 20' in f['stopped']
    assert load_ckpt(cwd/'stop0')['step']==8 and not any((cwd/'stop1').iterdir())

def test_the_few_words_between_ranks(two):
    for k,f in enumerate(two[0]): assert (f['mean'].item(), f['first'], f['turn'], f['slices'])==(1.5, 0, k, [k, k+2, k+4])

def test_a_killed_process_does_not_end_the_run(two):
    _,cwd,r = two
    assert 'exitcode: -9' in r.stderr
    for f in ('encoder/model.safetensors', 'encoder/config.json'): assert (cwd/'killed'/f).read_bytes()==(cwd/'whole'/f).read_bytes()
    steps = [row['step'] for row in read_log(cwd/'killed')]
    assert steps==[row['step'] for row in read_log(cwd/'whole')]
    assert r.stdout.count('Now 4 epochs of')==3      # whole, killed, and again: rank 0 alone prints

def test_the_same_command_in_another_job_does_not_go_on(two, monkeypatch, capsys):
    "What torchrun starts again goes on by itself; a person who gives the command again has to say --resume"
    monkeypatch.chdir(two[1]); monkeypatch.setattr(sys, 'argv', ['mim_pretrain', 'mae', '--out', 'killed', '--device', 'cpu'])
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'another')
    assert mim_pretrain_cli()==1 and 'killed already holds a run' in capsys.readouterr().err
