"""MixMIM, MAE and BEiT on the same number of encoder FLOPs: equal_flops.py OUT.json METHOD SEED [TOKENIZER]

Adds one run to OUT.json. Every method gets the encoder FLOPs that MixMIM's tiny preset needs for two epochs of the
images that ship with the package, forward passes counted; one that needs fewer a image sees more images. BEiT also
needs a trained tokenizer, the folder of one, whose training is not counted."""
import json, sys, time, torch
from pathlib import Path
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from mim_nb.augment import Augment
from mim_nb.beit import BEiT
from mim_nb.data import load_data
from mim_nb.evaluate import evaluate
from mim_nb.mae import MAE
from mim_nb.mixmim import MixMIM
from mim_nb.pretrain import machine
from mim_nb.tokenizers import load_tokenizer
from mim_nb.train import fit
from mim_nb.files import write_json

methods,epochs = dict(mixmim=MixMIM, mae=MAE, beit=BEiT),2

@torch.no_grad()
def flops(m, n=8):
    "Floating-point operations an image, forward: of the encoder, and of what predicts"
    x,mask,counts = m.normalize(torch.rand(n, m.in_chans, *m.img_size)),m.sample_mask(n),[]
    with sdpa_kernel(SDPBackend.MATH):              # whose products the counter sees
        with FlopCounterMode(display=False) as f: z = m.encode(x, mask)
        with FlopCounterMode(display=False) as g: m.decode(z, mask)
    return dict(encoder=f.get_total_flops()/n, decoder=g.get_total_flops()/n)

def run(method, seed, tokenizer=None):
    train,test = (load_data('fashion_mnist', s) for s in ('train','test'))
    torch.manual_seed(seed)
    cls = methods[method]; m = cls(**cls.presets['tiny'])
    if tokenizer: m.set_tokenizer(load_tokenizer(tokenizer))
    per_image = flops(m); budget = epochs*flops(MixMIM(**MixMIM.presets['tiny']))['encoder']
    recipe = dict(cls.recipes['tiny'], epochs=budget/per_image['encoder'])
    recipe['warmup_epochs'] = recipe['epochs']/12
    before,start = evaluate(m, train, test),time.time()
    log = fit(m, train, **{k: v for k,v in recipe.items() if k!='augment'}, augment=Augment(m.img_size[0], **recipe['augment']), seed=seed, device='cpu', bar=False)
    return dict(method=method, seed=seed, recipe=recipe, flops=per_image, seconds=time.time()-start, images=len(train), steps=log[-1]['step'], loss=log[-1]['loss'],
                before=before, after=evaluate(m, train, test), machine=machine(torch.device('cpu')))

if __name__=='__main__':
    if len(sys.argv)<4: sys.exit(__doc__)
    out,method,seed,*tokenizer = sys.argv[1:]
    r = run(method, int(seed), *tokenizer)
    old = json.loads(Path(out).read_text())['runs'] if Path(out).exists() else []
    command = 'for s in 0 1 2; do for m in mixmim mae beit; do python tools/equal_flops.py results/mixmim_equal_flops_cpu.json $m $s [runs/beit_$s/tokenizer]; done; done   # the tokenizers by mim_pretrain --seed $s; OMP_NUM_THREADS=1'
    write_json(out, dict(command=command, runs=[o for o in old if (o['method'],o['seed'])!=(method,int(seed))]+[r]))
    print({k: r[k] for k in ('method','seed','steps','seconds','before','after')})
