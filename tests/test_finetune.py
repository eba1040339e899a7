"""Every recipe as it stands, on every method; distortions on today's Pillow; averaged weights, alone and in two processes.
`torchrun` starts this very file twice: each process works through `suite`"""
import math, os, random, subprocess, sys
from itertools import islice
import mim_nb.train, numpy as np, pytest, timm, torch
from PIL import Image
from mim_nb.distort import Distorted, rand_augment
from mim_nb.finetune import Classifier, finetune, finetune_recipes, get_recipe
from mim_nb.images import ImageSet
from mim_nb.methods import create, methods
from mim_nb.ranks import together

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=1)
MIXMIM = dict(img_size=16, patch_size=2, embed_dim=16, depths=(1,1), num_heads=(1,2), window=None, decoder_dim=16, decoder_depth=1)
FAST = dict(epochs=1, warmup_epochs=0, batch_size=8, device='cpu', bar=False)

def method(name, in_chans=1, img_size=16):
    torch.manual_seed(0)
    sizes = dict(MIXMIM if name=='mixmim' else SMALL, img_size=img_size, in_chans=in_chans)
    return create(name, **{**sizes, **(dict(img_size=(32,64), patch_size=4) if name=='mixmim' and img_size!=16 else {})})

def labelled(n=16, classes=4, size=(16,16), chans=1, names=()):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, chans, *size), generator=g).to(torch.uint8)
    return ImageSet(images, torch.arange(n)%classes, names, 'these')

# ---- two processes

def state(c): return {k: v.clone() for k,v in c.state_dict().items()}

def averaged(name, **kw):
    return finetune(method(name), labelled(16), layer_decay=.75, ema=.5, mixup=.8, erase=.5, **{**FAST, **kw})

def cut(step):
    "A `Classifier.forward` that ends in a power cut"
    whole,calls = Classifier.forward,[]
    def forward(self, *args):
        calls.append(0)
        if len(calls)==step: raise RuntimeError('power cut')
        return whole(self, *args)
    Classifier.forward = forward
    return whole

def distorted(): return [x.sum().item() for x,_ in Distorted(labelled()).__getitems__([3,1,2])]

def suite(rank):
    "What each of two processes finds: name -> anything that can be saved"
    found = {n: state(averaged(n)) for n in methods}
    found['lars'] = state(finetune(method('mae'), labelled(), 'lars', **FAST))
    kw = dict(folder='run', save_every=1, epochs=2)
    os.makedirs('run', exist_ok=True)
    whole = cut(3)
    try: averaged('mae', **kw)
    except RuntimeError: pass
    Classifier.forward = whole
    torch.distributed.barrier()              # torchrun, too, starts again when all have ended
    found['resumed'],found['undisturbed'] = (state(averaged('mae', **o)) for o in (dict(kw, resume=True), dict(epochs=2)))
    found['few'] = len(state(finetune(method('mae'), labelled(6, 3), mixup=.8, **FAST)))
    try: finetune(method('mae'), labelled(), mixup=.8, **{**FAST, 'batch_size': 6})
    except ValueError as e: found['odd'] = str(e)
    return dict(found, hash=hash((3,1,2)), distorted=distorted())

if __name__=='__main__':
    torch.set_num_threads(1)
    rank = int(os.environ['RANK'])
    with together('cpu'): torch.save(suite(rank), f'found{rank}.pt')

# ---- the tests proper, in one process

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    cwd = tmp_path_factory.mktemp('two')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', __file__]
    r = subprocess.run(cmd, cwd=cwd, env=os.environ|dict(OMP_NUM_THREADS='1', PYTHONHASHSEED='1'),
                       capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert r.returncode==0, r.stdout[-3000:]+r.stderr[-5000:]
    return [torch.load(cwd/f'found{k}.pt', weights_only=True) for k in (0,1)]

def equal(a, b): return all(torch.equal(a[k], b[k]) for k in b)

@pytest.mark.parametrize('name', methods)
def test_two_processes_average_the_same_weights(two, name):
    a,b = (f[name] for f in two)
    assert equal(a, b) and any(k.startswith('ema.') for k in a)
    assert not torch.equal(a['net.head.weight' if 'net.head.weight' in a else 'net.head.fc.weight'], a['ema.module.head.weight' if 'ema.module.head.weight' in a else 'ema.module.head.fc.weight'])

def test_two_processes_resume_with_the_average(two):
    for f in two: assert equal(f['resumed'], f['undisturbed'])

def test_two_processes_and_pairs(two):
    for f in two: assert f['few'] and '6 images for 2 processes' in f['odd'] and 'take an even batch_size' in f['odd']

def test_frozen_in_two_processes(two):
    a,b = (f['lars'] for f in two)
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith('head.0'))       # each has its own statistics

def test_the_average_needs_no_gradients():
    c = averaged('mae')
    assert not any(p.requires_grad or p.grad is not None for p in c.ema.parameters())
    assert c.accuracy(labelled(), ema=True)>=0
    c = Classifier(method('mae'), 4, ema=.5)
    assert {n.split('.')[0] for n,p in c.named_parameters() if p.requires_grad}=={'net'}

def test_the_average_is_one():
    "After each step: the average takes a share of the new weights"
    m = method('mae')
    c = finetune(m, labelled(8), ema=.75, **FAST)             # one step
    torch.manual_seed(0); first = Classifier(m, 4).net.state_dict()
    for k,v in c.ema.module.state_dict().items():
        if v.is_floating_point(): torch.testing.assert_close(v, .75*first[k]+.25*c.net.state_dict()[k])

# ---- the recipes as they stand

@pytest.fixture
def harshly(monkeypatch):
    "Three steps of any run, at its highest rate"
    steps = []
    def few(*args, **kw): return islice(mim_nb.images.batches(*args, **kw), 3)
    monkeypatch.setattr(mim_nb.train, 'batches', few)
    monkeypatch.setattr(mim_nb.train, 'lr_at', lambda i, steps_, warmup, lr, min_lr: steps.append(lr) or lr)
    return steps

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('recipe', ['own', 'small', 'tiny', 'lars', 'lars_tiny'])
@pytest.mark.parametrize('chans', [1, 3])
def test_each_recipe_of_each_method_runs_as_it_stands(harshly, name, recipe, chans):
    recipe = name if recipe=='own' else recipe
    assert name in finetune_recipes
    m,data = method(name, chans),labelled(16, chans=chans)
    c = finetune(m, data, recipe, batch_size=8, device='cpu', bar=False)
    r = finetune_recipes[recipe]
    assert harshly==[r['lr']]*3
    start = Classifier(m, 4, frozen=r.get('frozen', False)).net.state_dict()
    moved = any(not torch.equal(v, start[k]) for k,v in c.net.state_dict().items() if v.is_floating_point() and 'head' not in k)
    assert moved!=c.frozen and all(p.isfinite().all() for p in c.parameters())
    rates = [b.drop_path1.drop_prob for b in c.net.modules() if hasattr(b, 'drop_path1') and hasattr(b.drop_path1, 'drop_prob')]
    assert max(rates, default=0)==pytest.approx(r.get('drop_path', 0))
    assert (c.disturb.mixup is not None)==bool(r.get('mixup')) and (c.disturb.erase is not None)==bool(r.get('erase'))

def test_recipes_are_complete_and_the_frozen_ones_freeze():
    for k,r in finetune_recipes.items():
        assert get_recipe(k)==r and bool(r.get('frozen'))==k.startswith('lars')
    assert get_recipe('mae', epochs=2)['epochs']==2 and finetune_recipes['mae']['epochs']==100

# ---- RandAugment on the Pillow that is installed

def image(chans, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (16,16,chans), np.uint8)
    return Image.fromarray(x.squeeze(-1) if chans==1 else x)

@pytest.mark.parametrize('chans', [1, 3])
@pytest.mark.parametrize('config', ['rand-m{}-inc1', 'rand-m{}-inc0', 'rand-m{}-mstd0.5-inc1', 'rand-m{}-mstd101-inc1'])
def test_all_magnitudes_of_all_operations(chans, config):
    random.seed(0); np.random.seed(0)
    for magnitude in range(11):
        for op in rand_augment(config.format(magnitude), chans).ops:
            op.prob = 1.
            assert op(image(chans)).size==(16,16), op

def test_posterized_images_keep_one_bit_and_all_else_is_timms():
    ours,theirs = rand_augment('rand-m9-mstd0.5-inc1', 3),timm.data.auto_augment.rand_augment_transform('rand-m9-mstd0.5-inc1', dict(img_mean=(128,)*3))
    assert [op.name for op in ours.ops]==[op.name for op in theirs.ops] and ours.num_layers==theirs.num_layers
    for a,b in zip(ours.ops, theirs.ops):
        assert (a.prob, a.magnitude, a.magnitude_std, a.kwargs)==(b.prob, b.magnitude, b.magnitude_std, b.kwargs)
        for level in range(11):
            if b.level_fn is None: continue
            random.seed(level); mine = a.level_fn(level, a.hparams)
            random.seed(level); other = b.level_fn(level, b.hparams)
            assert mine==other or a.name.startswith('Posterize') and (mine, other)==((1,), (0,))
    for seed in range(60):                                   # the same draws, and the same images where Pillow has them
        random.seed(seed); np.random.seed(seed); mine = ours(image(3))
        random.seed(seed); np.random.seed(seed)
        try: assert np.array_equal(mine, theirs(image(3)))
        except ValueError: assert len(np.unique(mine))<=4

@pytest.mark.parametrize('config', ['', 'rand-x9', 'augmix-m3', None, 9])
def test_what_is_no_randaugment(config):
    with pytest.raises(ValueError, match='timm has no RandAugment'): rand_augment(config, 1)

# ---- a batch is its own seed

def test_a_batch_is_distorted_alike_in_every_process(two):
    "Python starts each process with another seed for the hash of texts, and of nothing else"
    for f in two: assert (f['hash'], f['distorted'])==(hash((3,1,2)), distorted())
    if sys.implementation.name=='cpython' and sys.maxsize>2**32: assert two[0]['hash']==-4267894587036932458

def test_indices_of_any_kind_are_the_same_seed():
    d = Distorted(labelled())
    first = [x for x,_ in d.__getitems__([5,1,2])]
    for idx in (torch.tensor([5,1,2]), np.array([5,1,2]), (5,1,2)):
        assert all(torch.equal(a, b) for a,b in zip(first, [x for x,_ in d.__getitems__(idx)]))

@pytest.mark.parametrize('chans', [1, 3])
def test_distorted_by_workers_and_without(chans):
    kw = dict(FAST, batch_size=4, distort='rand-m9-mstd0.5-inc1', mixup=.8)
    a,b = (state(finetune(method('mae', chans), labelled(9, 3, chans=chans), workers=w, **kw)) for w in (0, 2))
    assert equal(a, b)

@pytest.mark.parametrize('size', [(16,16), (20,12), (1,7)])
def test_distorted_images_keep_their_shape(size):
    for chans in (1, 3):
        x,y = Distorted(labelled(3, size=size, chans=chans))[1]
        assert x.shape==(chans, *size) and x.dtype==torch.uint8 and y==1
    with pytest.raises(ValueError, match='1 or 3 channels, and these have 2'): Distorted(labelled(3, chans=2))

# ---- few images, other shapes

FULL = dict(mixup=.8, cutmix=1., erase=.5, drop_path=.1, smoothing=.1, distort='rand-m9-mstd0.5-inc1', ema=.9)

@pytest.mark.parametrize('n,classes', [(9, 3), (2, 2), (3, 3), (15, 5)])
@pytest.mark.parametrize('recipe', ['tiny', 'lars_tiny', 'mae', 'lars'])
def test_few_images(n, classes, recipe):
    frozen = recipe.startswith('lars')
    kw = dict(epochs=1, warmup_epochs=0, device='cpu', bar=False)
    c = finetune(method('mae'), labelled(n, classes), recipe, **kw, **({} if frozen else FULL))
    assert 0<=c.accuracy(labelled(n, classes))<=1

@pytest.mark.parametrize('name', methods)
def test_encoders_that_are_not_square(name):
    m = method(name, 3, (16,32))
    data = labelled(8, size=(20,24), chans=3)
    c = finetune(m, data, **{**FAST, **FULL})
    assert c.size==m.img_size and 0<=c.accuracy(data)<=1
    assert 0<=finetune(m, data, 'lars_tiny', **FAST).accuracy(data)<=1

def test_labels_of_a_classifier_are_names():
    "Dark, grey and bright images, of which the second set gives each another name"
    images = (torch.arange(12)%3*120).byte().view(-1,1,1,1).expand(-1,1,16,16)
    train,test = (ImageSet(images, torch.arange(12)%3, n, 'these') for n in (['ant','bee','cat'], ['cat','ant','bee']))
    c = finetune(method('mae'), train, **{**FAST, 'epochs': 60, 'lr': 1e-2})
    assert c.accuracy(train)==c.accuracy(ImageSet(images, train.labels))==1 and c.accuracy(test)==0

# ---- mistakes

def says(f, text):
    with pytest.raises(ValueError) as e: f()
    assert text in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('kw,text', [
    (dict(recipe='biet'), "unknown recipe 'biet'"), (dict(recipe={}), 'the recipe lacks lr, weight_decay, augment'), (dict(lrr=1), "unknown setting of a recipe 'lrr'"),
    (dict(seed=-1), 'seed must be'), (dict(device='gpu'), "unknown device 'gpu'"), (dict(pool='max'), "pool must be 'mean' or 'cls'"),
    (dict(mixup=-1.), 'mixup must be'), (dict(mixup=math.nan), 'mixup must be'), (dict(smoothing=1.), 'smoothing must be'), (dict(erase=2.), 'erase must be'),
    (dict(drop_path=1.), 'drop_path must be'), (dict(ema=1.), 'ema must be'), (dict(ema=math.nan), 'ema must be'), (dict(epochs=-1), 'epochs must be'),
    (dict(epochs=math.inf), 'epochs must be'), (dict(lr=math.nan), 'lr must be'), (dict(batch_size=0), 'batch_size must be'), (dict(batch_size=7, mixup=.8), 'take an even batch_size'),
    (dict(distort='magic'), "timm has no RandAugment 'magic'"), (dict(recipe='lars_tiny', ema=.9), 'leave out ema')])
def test_settings_that_cannot_work(kw, text): says(lambda: finetune(method('mae'), labelled(), **{**FAST, **kw}), text)

def test_images_that_nothing_can_be_learned_from():
    m = method('mae')
    for data,text in [(labelled(classes=1), 'all 16 images of these are of one class'), (ImageSet(labelled().images, name='these'), 'these has no labels'),
                      (ImageSet(labelled(2).images, [0,-1], name='these'), 'these has no labels'), (ImageSet(labelled(2).images, [0,300_000_000], name='these'), 'number the classes from 0')]:
        says(lambda: finetune(m, data, **FAST), text)

def test_outputs_that_are_not_finite_have_no_accuracy():
    c = Classifier(method('mae'), 4)
    with torch.no_grad(): c.net.blocks[0].mlp.fc1.bias[0] = math.nan
    says(lambda: c.accuracy(labelled()), 'not finite')
    says(lambda: c.accuracy(labelled(), ema=True), 'no averaged weights')
    says(lambda: c.accuracy(ImageSet(labelled().images)), 'no labels')

def test_a_network_whose_blocks_cannot_be_skipped():
    with pytest.warns(UserWarning, match='drop_path=0.1 has no effect'): Classifier(timm.create_model('resnet10t', num_classes=0), 4, drop_path=.1)
    says(lambda: Classifier(timm.create_model('resnet10t', num_classes=0), 4, pool='cls'), 'no class token')
