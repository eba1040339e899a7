"""Every method on one budget, examined in one way: the numbers of nbs/16b_compare.ipynb

    python tools/compare.py                                        # two CPU cores, the shipped images
    python tools/compare.py --budget wider --names beit,mcbeit,scratch_beit      # with larger first weights
    python tools/compare.py --budget small --jobs 1      # a GPU, all of Fashion-MNIST

A stopped comparison goes on where it was when the same command is given again. The result is results/compare_BUDGET_DEVICE.json.
"""
import json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from mim_nb.data import load_data
from mim_nb.evaluate import evaluate_layers, finetune, load_encoder, split
from mim_nb.methods import create, methods
from mim_nb.prepare import get_tokenizer
from mim_nb.pretrain import machine, pretrain
from mim_nb.runfolder import run_settings as settings
from mim_nb.ranks import get_device
from mim_nb.runs import read_log
from mim_nb.files import write_json

# the methods' preset, epochs of pretraining, the recipe of fine-tuning, its epochs by the share of the labels, and where a model differs from its preset
_tiny = dict(preset='tiny', data='fashion_mnist', epochs=4, recipe='tiny', finetune={'1': 2, '.1': 10, '.01': 30}, model={})
budgets = dict(tiny=_tiny,
               wider=dict(_tiny, model={n: dict(init_std=.1) for n in ('beit','mcbeit')}),      # .02 is for 768 numbers a token, see nbs/16b_compare.ipynb
               small=dict(preset='small', data='fashion_mnist_full', epochs=20, recipe='small', finetune={'1': 10, '.1': 60, '.01': 300}, model={}))
# no method: supervised training alone of the encoder that MAE, DeepMIM and SAIM share, of BEiT's and mc-BEiT's, and of MixMIM's
scratch = {'scratch': 'mae', 'scratch_beit': 'beit', 'scratch_mixmim': 'mixmim'}

def gflops(f):
    "What a call computes, in 10⁹ floating point operations"
    with FlopCounterMode(display=False) as count: f()
    return count.get_total_flops()/1e9

def cost(name, preset):
    "GFLOPs per image: the encoder as it is used, and a step of pretraining forward and back"
    m = create(name, preset); x = torch.rand(8, m.in_chans, *m.img_size)
    target = None
    if hasattr(m, 'set_tokenizer'):
        shape = (8, m.num_patches); target = torch.zeros(*shape, m.head.out_features) if name=='mcbeit' else torch.zeros(shape, dtype=torch.long)
    return dict(encoder_gflops=gflops(lambda: m.encoder.forward_features(x))/8, step_gflops=gflops(lambda: m(x, target=target).loss.backward())/8,
                encoder_parameters=sum(p.numel() for p in m.encoder.parameters()))

def trained(m, train, test, b, seed, device):
    "Accuracy after fine-tuning, by the share of the labels"
    def run(share, epochs):
        some = train if share=='1' else split(train, float(share), seed)[0]
        return finetune(m, some, b['recipe'], epochs=epochs, seed=seed, device=device).accuracy(test)
    return dict(finetune={share: run(share, epochs) for share,epochs in b['finetune'].items()})

def examined(m, train, test, seed):
    "The frozen probes after every block, and the blocks that look best on a tenth of the training images which the probes' training leaves out"
    held,rest = split(train, .1, seed)
    layers,chosen = evaluate_layers(m, train, test),evaluate_layers(m, rest, held)
    return dict(layers=layers, best={p: max(range(len(chosen)), key=lambda l: chosen[l][p]) for p in ('knn','linear')})

def one(name, seed, budget, out, device):
    "Pretrain one method, if that is not done, and examine it; or train from scratch"
    b,folder,start = budgets[budget],out/f'{name}_{seed}',time.process_time()
    train,test = (load_data(b['data'], s) for s in ('train','test'))
    model = b['model'].get(scratch.get(name, name), {})
    torch.manual_seed(seed)
    if name in scratch:
        folder.mkdir(parents=True, exist_ok=True)
        row,spent = trained(create(scratch[name], b['preset'], **model), train, test, b, seed, device),[]
    else:
        config = settings(name, b['preset'], model=model, recipe=dict(epochs=b['epochs']), data=b['data'], seed=seed)
        has_tokenizer = hasattr(methods[name], 'set_tokenizer')
        begun,done = (folder/'config.json').exists(),folder/'processor_seconds.json'
        if not (folder/'metrics.json').exists():
            pretrain(folder, config, resume=begun, device=device, tokenizer=out/f'tokenizer_{seed}' if has_tokenizer else None)
            write_json(done, time.process_time()-start)
        spent,start = [json.loads(done.read_text())],time.process_time()
        encoder,metrics = load_encoder(folder).to(get_device(device)),json.loads((folder/'metrics.json').read_text())
        row = dict(before=metrics['before'], **examined(encoder, train, test, seed), **cost(name, b['preset']), **trained(encoder, train, test, b, seed, device),
                   loss=[[r['epoch'], round(r['loss'], 4)] for r in read_log(folder)])
    write_json(folder/'compare.json', dict(method=name, seed=seed, **row, processor_seconds=[*spent, time.process_time()-start]))

def tokenizer(seed, budget, out, device):
    "The dVAE that BEiT and mc-BEiT share"
    b = budgets[budget]
    torch.manual_seed(seed)
    get_tokenizer(create('beit', b['preset']).to(get_device(device)), load_data(b['data']), settings('beit', b['preset'], seed=seed), out/f'tokenizer_{seed}', device=device)

@call_parse
def main(
    budget:str='tiny',       # tiny, wider or small: a preset of all methods, and what is spent on it
    seeds:str='0,1,2',       # separated by commas
    names:str=None,          # methods, separated by commas; default: all, and all from scratch
    out:str=None,            # where runs go; default: runs/compare_BUDGET
    jobs:int=2,              # processes at a time, of one thread each
    device:str='auto',       # auto, cpu, cuda
    only:str=None,           # one task, such as mae:0 (what the processes are given)
):
    "Compare all methods on one budget"
    out = Path(out or f'runs/compare_{budget}'); out.mkdir(parents=True, exist_ok=True)
    if only:
        name,seed = only.split(':')
        return tokenizer(int(seed), budget, out, device) if name=='tokenizer' else one(name, int(seed), budget, out, device)
    chosen = f' --names {names}' if names else ''
    seeds,names,start = [int(s) for s in seeds.split(',')],names.split(',') if names else [*methods, *scratch],time.time()
    files = {f'tokenizer:{s}': out/f'tokenizer_{s}'/'config.json' for s in seeds}
    results = {f'{n}:{s}': out/f'{n}_{s}'/'compare.json' for s in seeds for n in names}
    def run(task):
        if (files|results)[task].exists(): return
        with open(out/f'{task.replace(":","_")}.txt', 'w') as log:
            args = ['--budget', budget, '--out', str(out), '--device', device, '--only', task]
            subprocess.run([sys.executable, __file__, *args], check=True, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (dict(OMP_NUM_THREADS='1') if jobs>1 else {}))
        print(f'{time.time()-start:6.0f} s  {task} done', flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, files)); list(pool.map(run, results))
    device = get_device(device)
    rows = [json.loads(f.read_text()) for f in results.values()]
    command = f"python tools/compare.py --budget {budget} --seeds {','.join(map(str, seeds))}{chosen} --jobs {jobs}"
    file = Path(__file__).parents[1]/'results'/f'compare_{budget}_{device.type}.json'
    write_json(file, dict(command=command, budget=budgets[budget], machine=machine(device), rows=rows))
    print(f'written to {file}')
