"mc-BEiT against the authors' numbers, and that it never builds what it need not"
import json
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from PIL import Image
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from mim_nb.beit import BEiT
from mim_nb.checkpoints import load_official, official_name
from mim_nb.mcbeit import McBEiT, cross_entropies, refine
from mim_nb.methods import create
from mim_nb.mim import leak
from mim_nb.pretrain import mim_pretrain
from mim_nb.tokenizers import DVAE, save_tokenizer

PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'mcbeit_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}
X,MASK,TARGET = FIX['in/images'],FIX['in/bool_masked_pos'],FIX['in/d_logits'].flatten(2).mT

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def run(device='cpu', **kw):
    m = load_official('mcbeit', WEIGHTS, mean=0., std=1., **kw).to(device)
    out = m(X.to(device), MASK.to(device), TARGET.to(device)); out.loss.backward()
    return m,out

@pytest.fixture(scope='module')
def ref(): return run()

def grad(m, name): return dict(m.named_parameters())[official_name(McBEiT, name)].grad.cpu()

def test_features_logits_target_and_loss(ref):
    m,out = ref
    scalars = json.loads((PARITY/'mcbeit_a.json').read_text())['scalars']
    with torch.no_grad(): z = m.encode(X, m.as_mask(MASK))
    assert close(z, FIX['out/features']) and close(out.pred, FIX['out/logits_all'][MASK])
    assert close(refine((TARGET/4).softmax(-1), z[:,1:]), FIX['out/soft_target'])
    assert abs(out.loss.item()-scalars['loss']) <= 1e-5*scalars['loss'] and abs(out.logs['accuracy']-scalars['mlm_acc'])<1e-6

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(grad(ref[0], name), GRADS[name])

def test_detaching_shows_in_gradients_only(ref):
    m,out = run(detach=True)
    torch.testing.assert_close(out.loss, ref[1].loss, rtol=1e-6, atol=0)
    assert [n for n in GRADS if close(grad(m, n), GRADS[n])]==['lm_head.bias']

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30), st.floats(.1, 8), st.floats(0, 1), st.floats(.02, 4), st.booleans())
def test_loss_is_cross_entropy_with_the_refined_target(seed, tau, omega, tau_sim, detach):
    "The loss in its definition: soft cross-entropy at hidden places, for any mask, also one that hides differently much in each image"
    torch.manual_seed(seed)
    m = McBEiT(16, 4, 1, 32, 1, 1, vocab_size=24, tau=tau, omega=omega, tau_sim=tau_sim, detach=detach)
    torch.nn.init.normal_(m.head.weight)
    x,mask,target = torch.rand(3,1,16,16),torch.rand(3,16)<torch.tensor([[.2],[.5],[.9]]),torch.randn(3,16,24)*3
    mask[:,0] = True
    z = m.encode(m.normalize(x), m.as_mask(mask)); f = z.detach() if detach else z
    want = F.cross_entropy(m.head(z[:,1:])[mask], refine((target/tau).softmax(-1), f[:,1:], omega, tau_sim)[mask])
    got = m(x, mask, target).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    params = [p for n,p in m.named_parameters() if p.requires_grad]
    for a,b in zip(*(torch.autograd.grad(l, params) for l in (got, want))): torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)

class Sizes(TorchDispatchMode):
    "Notes how large the results of all operations are"
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(o) and o.untyped_storage().nbytes()//o.element_size()>=o.numel() and not func.is_view]
        return out

def test_no_second_copy_of_the_tokenizers_output():
    "V is the largest number here by far: no result of any operation, forward or backward, may have B·L·V entries"
    b,v = 5,2**18                                       # two images at a time, and one at the end
    m = McBEiT(16, 4, 1, 8, 1, 1, vocab_size=v)
    x,mask,target = torch.rand(b,1,16,16),m.sample_mask(b).hidden,torch.randn(b,16,v)
    with Sizes() as s: out = m(x, mask, target); out.loss.backward()
    assert max(s.seen)==int(mask.sum())*v < b*16*v
    torch.testing.assert_close(out.loss, F.cross_entropy(out.pred, refine((target/4).softmax(-1), m.encode(m.normalize(x), m.as_mask(mask))[:,1:])[mask]), rtol=1e-5, atol=1e-5)

def test_full_size():
    full = json.loads((PARITY/'fullsize_mcbeit.json').read_text())
    with torch.device('meta'): m = create('mcbeit', 'base')
    assert {n: list(p.shape) for n,p in m.named_parameters()}=={ours: s for k,s in full['state_dict'].items() if (ours := official_name(McBEiT, k))}
    assert sum(p.numel() for p in m.parameters())==full['counts']['trainable_parameters']
    assert sum(p.numel() for p in m.encoder.parameters())==full['counts']['encoder_parameters']

def test_only_mask_target_and_loss_differ_from_beit():
    "The issue's promise, as a list"
    own = {n for n in vars(McBEiT) if callable(getattr(McBEiT, n)) and not n.startswith('__')}
    assert own=={'check_masks', 'sample_mask', 'target', 'loss', 'logs'}
    torch.manual_seed(0); a = BEiT()
    torch.manual_seed(0); b = McBEiT()
    assert a.state_dict().keys()==b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def test_recipes():
    for k,r in McBEiT.recipes.items():
        assert r['betas']==(.9,.98) and 'jitter' not in r['augment']
        assert {n: v for n,v in r.items() if n not in ('betas','augment')}=={n: v for n,v in BEiT.recipes[k].items() if n not in ('betas','augment')}
    assert McBEiT.presets==BEiT.presets and set(McBEiT.presets)==set(McBEiT.recipes)=={'tiny','small','base','large'}

@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(28,4,1), (32,8,3), (24,4,3)]))
def test_nothing_leaks(seed, size):
    torch.manual_seed(seed)
    s,p,c = size
    m = McBEiT(s, p, c, embed_dim=32, depth=2, num_heads=2, vocab_size=16, tokenizer=DVAE(s, p, c, 16, width=16, depth=1))
    torch.nn.init.normal_(m.encoder.rel_pos_bias.relative_position_bias_table)
    own,other = leak(m, torch.rand(2,c,s,s))
    assert own==0 and other>0

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**30), st.floats(0, 1), st.floats(.01, 10))
def test_refined_choices_are_choices(seed, omega, tau_sim):
    torch.manual_seed(seed)
    p,f = torch.randn(2,9,7).softmax(-1),torch.randn(2,9,5)
    r = refine(p, f, omega, tau_sim)
    assert r.min()>=0 and torch.allclose(r.sum(-1), torch.ones(2,9), atol=1e-5)
    order = torch.randperm(9)
    torch.testing.assert_close(refine(p[:,order], f[:,order], omega, tau_sim), r[:,order])       # patches have no order
    torch.testing.assert_close(refine(p, f*3, omega, tau_sim), r, rtol=1e-4, atol=1e-6)          # nor do lengths of features matter

def test_tokenizer_is_left_alone_and_pictures_work():
    m = McBEiT(tokenizer=DVAE()).train(); x = torch.rand(2,1,28,28)
    m(x).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in m.tokenizer.parameters())
    logits = m.tokenizer.logits(x).clone(); given = logits.clone()
    m(x, target=given); assert torch.equal(given, logits)
    rows = m.pictures(x, m.sample_mask(2))
    assert len(rows)==4 and all(r.shape==x.shape for r in rows.values())

@pytest.mark.parametrize('kw,message', [(dict(tau=0), 'tau must be a number greater than 0'), (dict(tau=float('nan')), 'tau must be a number greater than 0'), (dict(tau_sim=-1), 'tau_sim must be a number greater than 0'),
    (dict(omega=-.1), 'omega must be a number of at least 0 and of at most 1'), (dict(omega=1.1), 'omega must be a number of at least 0 and of at most 1'), (dict(mask_ratio=0), 'greater than 0 and less than 1'),
    (dict(tokenizer=DVAE(patch_size=2)), '14x14 tokens'), (dict(tokenizer=DVAE(vocab_size=512)), 'vocab_size=512')])
def test_what_does_not_fit(kw, message):
    with pytest.raises(ValueError, match=message): McBEiT(**kw)

def test_targets_that_do_not_fit():
    m,x = McBEiT(),torch.rand(2,1,28,28)
    with pytest.raises(ValueError, match='no tokenizer'): m(x)
    for t in (torch.randint(256, (2,49)), torch.rand(2,49,255), torch.rand(2,50,256)):
        with pytest.raises(ValueError, match=r"the target must be the tokenizer's logits, of shape \(2, 49, 256\)"): m(x, target=t)

def test_bfloat16_keeps_the_loss_in_float32(ref):
    m,out = ref
    with torch.autocast('cpu', torch.bfloat16): loss = m(X, MASK, TARGET).loss
    assert loss.dtype==torch.float32 and abs(loss-out.loss)<.02

def test_pretraining_command(tmp_path):
    "`mim_pretrain mcbeit` as for BEiT, with a tokenizer that is there already"
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(24): Image.fromarray(torch.randint(256, (32,32), dtype=torch.uint8).numpy()).save(photos/f'{i}.png')
    save_tokenizer(DVAE(), tmp_path/'tokenizer')
    kw = dict(method='mcbeit', data=str(photos), epochs=1, batch=8, device='cpu', workers=0, tokenizer=str(tmp_path/'tokenizer'))
    mim_pretrain(out=tmp_path/'run', **kw)
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['method']=='mcbeit' and config['recipe']['betas']==[.9,.98]
    assert {'encoder', 'metrics.json', 'reconstructions.png', 'log.jsonl', 'last.ckpt'} <= {f.name for f in (tmp_path/'run').iterdir()}
    with pytest.raises(ValueError, match='between 0 and 1'): mim_pretrain(out=tmp_path/'bad', mask=1.5, **kw)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m,out = run('cuda')
    assert close(out.pred.cpu(), FIX['out/logits_all'][MASK])
    for n,g in GRADS.items(): assert close(grad(m, n), g), n
