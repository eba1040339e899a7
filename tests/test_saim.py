"SAIM against the authors' numbers, that it looks at nothing it must not see, and that it never builds a mask"
import json
from pathlib import Path
import pytest, timm, torch, torch.nn.functional as F
from PIL import Image
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from mim_nb.attention import attend
from mim_nb.checkpoints import load_official, official_name, save_encoder
from mim_nb.masks import random_order
from mim_nb.methods import create
from mim_nb.mim import leak
from mim_nb.patches import patchify, unpatchify
from mim_nb.pretrain import mim_pretrain
from mim_nb.saim import SAIM, _merge_qkv, by_turn, gaussian_kernel
from mim_nb.train import param_groups

PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'saim_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}
X,ORDER = FIX['in/images'],FIX['in/noise'].argsort(1)

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def run(device='cpu', **kw):
    m = load_official('saim', WEIGHTS, mean=0., std=1., num_heads=4, **kw).to(device)
    out = m(X.to(device), ORDER.to(device)); out.loss.backward()
    return m,out

@pytest.fixture(scope='module')
def ref(): return run()

def grad(m, name):
    "The gradient of one of the authors' weights: q, k and v are thirds of ours"
    head,_,tail = official_name(SAIM, name).rpartition('.attn.')
    if tail[:2] in ('q.','k.','v.'): return dict(m.named_parameters())[f'{head}.attn.qkv.{tail[2:]}'].grad.chunk(3)['qkv'.index(tail[0])].cpu()
    return dict(m.named_parameters())[official_name(SAIM, name)].grad.cpu()

def turns(order):
    "The turn of every token, cls first of all, (B,1+L)"
    return torch.cat([torch.zeros_like(order[:,:1]), 1+order.argsort(1)], 1)

def masks(order):
    "The paper's content and query masks, bool (B,1,1+L,1+L), in image order"
    t = turns(order); seen = t[:,None,:,None]-t[:,None,None,:]
    return seen>=0,seen>0

def masked(m, x, order):
    "SAIM as the paper writes it: tokens in image order, and masks"
    e,(content,query) = m.encoder,masks(order)
    def block(b, x, context, mask):
        x = x + b.drop_path1(attend(b.attn, b.norm1(x), b.norm1(context), mask))
        return x + b.drop_path2(b.mlp(b.norm2(x)))
    h = torch.cat([e.cls_token.expand(len(x),-1,-1), e.patch_embed(m.normalize(x))], 1)+e.pos_embed
    g,step = e.pos_embed[:,1:].expand(len(x),-1,-1),len(e.blocks)//m.query_depth
    for i,b in enumerate(e.blocks):
        h = block(b, h, h, content)
        if (i+1)%step==0: g = block(m.query_blocks[i//step], g, h, query[:,:,1:])
    return h,m.head(e.norm(g))

def test_predictions_content_target_and_loss(ref):
    m,out = ref
    scalars = json.loads((PARITY/'saim_a.json').read_text())['scalars']
    assert close(out.pred, FIX['out/pred'][:,1:]) and close(out.target, FIX['out/target'])
    assert abs(out.loss.item()-scalars['loss']) <= 1e-5*scalars['loss']
    with torch.no_grad(): h = m.encode(X, m.as_mask(ORDER))[-1]
    assert close(torch.cat([h[:,:1], by_turn(h[:,1:], ORDER.argsort(1))], 1), FIX['out/h'])

def test_masks_are_the_published_ones():
    content,query = masks(ORDER)
    query = query.clone(); query[:,:,0,0] = True                            # theirs lets cls ask itself; nobody uses the answer
    assert torch.equal(content[:,0], FIX['out/content_visible']) and torch.equal(query[:,0], FIX['out/query_visible'])

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(grad(ref[0], name), GRADS[name])

def test_every_weight_matters(ref):
    "Parity would be worth little if the numbers did not depend on a weight: nudge each, and the predictions move"
    m,out = ref
    for n,p in m.named_parameters():
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(X, ORDER).pred, FIX['out/pred'][:,1:])
            p.copy_(old)
        assert moved, n

def test_sizes_and_blur_come_from_the_checkpoint(ref):
    m,_ = ref
    assert torch.equal(m.kernel, WEIGHTS['gaussian_blur.weight']) and (gaussian_kernel(9, 1.)-m.kernel[0,0]).abs().max()<1e-8
    sharp = load_official('saim', {k: v for k,v in WEIGHTS.items() if 'blur' not in k}, num_heads=4)
    assert sharp.kernel is None and sharp.query_depth==4
    two = load_official('saim', {k: v for k,v in WEIGHTS.items() if not k.startswith(('query_blocks.2','query_blocks.3'))}, num_heads=4)
    assert two.query_depth==2
    with pytest.raises(ValueError, match='could not be placed'): load_official('saim', {k: v for k,v in WEIGHTS.items() if '.k.bias' not in k}, num_heads=4)

def test_full_size():
    full = json.loads((PARITY/'fullsize_saim.json').read_text())
    with torch.device('meta'): m = create('saim', 'base')
    theirs = {official_name(SAIM, k): torch.empty(s, device='meta') for k,s in full['state_dict'].items()}
    _merge_qkv(m, theirs, '')
    assert {n: p.shape for n,p in m.state_dict().items()}=={n: p.shape for n,p in theirs.items()}
    c = full['counts']
    assert sum(p.numel() for p in m.parameters())==c['parameters']
    assert sum(p.numel() for p in m.parameters() if p.requires_grad)==c['trainable_parameters']
    assert sum(p.numel() for p in m.encoder.parameters())==c['encoder_parameters']

def tiny(**kw): return SAIM(**{**dict(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=4, num_heads=2, blur=(3,.5)), **kw})

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([1,2,4]), st.booleans(), st.integers(1, 3))
def test_sorted_is_masked(seed, query_depth, share, chans):
    "The sorted, causal form gives the masked form's tensors and gradients"
    torch.manual_seed(seed)
    m = tiny(query_depth=query_depth, share_weight=share, in_chans=chans).double()
    x,order = torch.rand(3,chans,16,16, dtype=torch.float64),random_order(3, 16)
    pred = m(x, order).pred
    h,want = masked(m, x, order)
    assert (pred-want).abs().max()<=1e-12*want.abs().max()
    w = m.encoder.blocks[0].attn.qkv.weight; r = torch.randn_like(pred)
    a,b = (torch.autograd.grad((p*r).sum(), w)[0] for p in (pred, want))
    assert (a-b).abs().max()<=1e-11*b.abs().max()

@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([1,2]), st.booleans(), st.sampled_from(['random','raster']))
def test_nothing_leaks(seed, query_depth, share, order):
    "The k-th prediction has exactly no gradient to the pixels of every patch from the k-th on, and some to each before"
    torch.manual_seed(seed)
    m = tiny(depth=2, query_depth=query_depth, share_weight=share, order=order)
    own,other = leak(m, torch.rand(2,1,16,16))
    assert own==0 and other>0
    x = torch.rand(1,1,16,16, requires_grad=True)
    out = m(x); p = by_turn(out.pred, out.mask)[0]
    for k in range(16):
        g, = torch.autograd.grad(p[k].sum(), x, retain_graph=True, allow_unused=True)
        sees = by_turn(patchify(g, 4), out.mask)[0].abs().amax(-1)
        assert (sees[k:]==0).all() and (sees[:k]>0).all()

class Calls(TorchFunctionMode):
    def __init__(self): super().__init__(); self.calls = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention: self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

class Shapes(TorchDispatchMode):
    "Shapes of all that is computed, forward and backward"
    def __init__(self): super().__init__(); self.seen = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if torch.is_tensor(t)}
        return out

def test_causal_reaches_the_kernel_in_both_streams():
    m = tiny()
    with Calls() as c: m(torch.rand(2,1,16,16))
    assert len(c.calls)==8
    for args,kw in c.calls: assert args[3] is None and args[5] is True and not kw      # attn_mask, is_causal

def test_no_mask_and_no_scores_are_built():
    m,L = tiny(img_size=28, depth=1),49
    with Shapes() as s: m(torch.rand(2,1,28,28)).loss.backward()
    assert not [o for o in s.seen if len(o)>1 and o[-1] in (L,L+1) and o[-2] in (L,L+1)]

def test_weights_may_be_shared():
    a,b = tiny(query_depth=2),tiny(query_depth=2, share_weight=True)
    assert all(p is q for p,q in zip(b.query_blocks.parameters(), b.encoder.blocks.parameters()))
    assert sum(p.numel() for p in a.parameters())-sum(p.numel() for p in b.parameters())==sum(p.numel() for p in a.query_blocks.parameters())
    names = [n for g in param_groups(b, .05) for n in g['params']]
    assert len(names)==len({id(p) for p in names})
    c = tiny(query_depth=2, share_weight=True); c.load_state_dict(b.state_dict())
    x,o = torch.rand(2,1,16,16),random_order(2, 16)
    assert torch.equal(c(x, o).loss, b(x, o).loss)

def test_all_that_is_trained_gets_a_gradient():
    m = tiny(query_depth=2, drop_path=.1).train()
    m(torch.rand(4,1,16,16)).loss.backward()
    assert [n for n,p in m.named_parameters() if p.requires_grad and p.grad is None]==[] and not m.encoder.pos_embed.requires_grad

def test_first_weights():
    "q, k and v start as wide as three matrices of their own would"
    m = SAIM(embed_dim=96)
    for b in (*m.encoder.blocks, *m.query_blocks):
        assert abs(b.attn.qkv.weight.abs().max()-(6/192)**.5)<1e-3 and abs(b.mlp.fc1.weight.abs().max()-(6/480)**.5)<1e-3
    assert not torch.equal(m.query_blocks[0].mlp.fc1.weight, m.encoder.blocks[0].mlp.fc1.weight) and m.head.fc2.bias.abs().max()==0
    shared = SAIM(share_weight=True).encoder.blocks[0].attn.qkv.weight           # scaled once, not twice
    assert abs(shared.abs().max()-(6/192)**.5)<1e-3

def test_presets_and_recipes():
    assert set(SAIM.presets)==set(SAIM.recipes)=={'tiny','small','base'}
    base = SAIM.recipes['base']
    assert (base['weight_decay'], base['lr'], base['min_lr'], base['betas'], base['clip'])==(.5, 2e-4*2048/256, 0, (.9,.95), None)
    m = SAIM(**json.loads(json.dumps(SAIM.presets['tiny'])))                      # as a run's config.json gives them back
    assert m.query_depth==2 and m.kernel.shape==(1,1,5,5)

def test_few_patches():
    for size in (4, 8):
        out = tiny(img_size=size, depth=1, blur=None)(torch.rand(2,1,size,size))
        assert out.loss.isfinite() and all(v.isfinite() for v in out.logs.values())

def test_orders():
    m = SAIM()
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(m.sample_mask(4, g()).order, m.sample_mask(4, g()).order) and m.sample_mask(4).order.sort(1).values.eq(torch.arange(49)).all()
    assert torch.equal(SAIM(order='raster').sample_mask(2).order, torch.arange(49).expand(2, -1))

def test_blur_and_target():
    x = torch.rand(2,3,28,28)
    m = SAIM(in_chans=3, blur=(9,1.), norm_pix=False)
    n = m.normalize(x)
    want = torch.stack([F.conv2d(n[:,c:c+1], m.kernel[:1], padding=4)[:,0] for c in range(3)], 1)
    torch.testing.assert_close(m.target(x), patchify(want, 4))
    assert abs(m.kernel[0].sum()-1)<1e-6 and torch.equal(SAIM(blur=None, norm_pix=False).target(x[:,:1]), patchify(SAIM().normalize(x[:,:1]), 4))
    t = SAIM(in_chans=3).target(x)
    torch.testing.assert_close(t.mean(-1), torch.zeros(2,49), atol=1e-5, rtol=0); torch.testing.assert_close(t.var(-1), torch.ones(2,49), atol=1e-3, rtol=0)

def test_bfloat16_keeps_target_and_loss_in_float32():
    m,x = tiny(),torch.rand(2,1,16,16); o = random_order(2, 16)
    full = m(x, o)
    with torch.autocast('cpu', torch.bfloat16): out = m(x, o)
    assert torch.equal(out.target, full.target) and out.loss.dtype==torch.float32 and abs(out.loss-full.loss)<.05

@pytest.mark.parametrize('kw,message', [(dict(depth=4, query_depth=3), "query_depth must divide the encoder's depth 4, got 3: take one of 1, 2, 4"),
    (dict(query_depth=0), 'query_depth must divide'), (dict(query_depth=8), 'query_depth must divide'), (dict(order='spiral'), "unknown order 'spiral'"),
    (dict(blur=(8,1.)), 'must be odd, to have a middle, got 8: take 7 or 9'), (dict(blur=(17,1.)), 'has 17 pixels and the image only 16'),
    (dict(blur=(5,0)), 'sigma of the blur must be greater than 0'), (dict(blur=9), 'blur is a pair'), (dict(img_size=15), 'not a multiple of the patch')])
def test_what_does_not_fit(kw, message):
    with pytest.raises(ValueError, match=message): tiny(**kw)

def test_what_is_no_order():
    m,x = tiny(),torch.rand(2,1,16,16)
    twice = torch.arange(16).repeat(2, 1); twice[1,3] = 4
    for o in (twice, torch.arange(1, 17).expand(2, -1)):
        with pytest.raises(ValueError, match='An order must name each of the 16 patches exactly once'): m(x, o)
    for o in (torch.zeros(2,16,dtype=torch.bool), torch.arange(16), torch.arange(16).expand(3,-1), torch.arange(15).expand(2,-1), torch.rand(2,16)):
        with pytest.raises(ValueError, match="SAIM's mask is an order"): m(x, o)

def test_completion():
    "What is known stays, what is unknown has no influence, and every turn changes one patch"
    m,x,order = tiny(norm_pix=False, blur=None).eval(),torch.rand(2,1,16,16),random_order(2, 16)
    frames = m.complete(x, order, known=5)
    assert frames.shape==(12,2,1,16,16) and frames.min()>=0 and frames.max()<=1
    p = torch.stack([by_turn(patchify(f, 4), order) for f in frames])
    assert torch.equal(p[:,:,:5], by_turn(patchify(x, 4), order)[:,:5].expand(12,-1,-1,-1)) and (p[0,:,5:]==.5).all()
    for k in range(11): assert ((p[k+1]!=p[k]).any(-1)==(torch.arange(16)==5+k)).all()
    other = torch.where((order.argsort(1)<5)[...,None], patchify(x, 4), torch.rand(2,16,16))
    assert torch.equal(m.complete(unpatchify(other, 4), order, known=5), frames)
    first = by_turn(patchify(m.reconstruct(x, order), 4), order)[:,5]
    torch.testing.assert_close(p[1,:,5], first)
    assert torch.equal(m.complete(x, order, known=16)[-1], x)

def test_pictures():
    m,x = SAIM(),torch.rand(2,1,28,28)
    rows = m.pictures(x, m.sample_mask(2))
    assert all(r.shape==x.shape and r.min()>=0 and r.max()<=1 for r in rows.values())
    best = m.paint(m.target(x), x)                                              # the target itself, un-normalised: the blurred image
    torch.testing.assert_close(best, (F.conv2d(m.normalize(x), m.kernel, padding=4)*m.std+m.mean).clamp(0,1))

def test_encoder_goes_home(tmp_path):
    m = SAIM().eval(); x = torch.rand(2,1,28,28)
    save_encoder(m, tmp_path/'encoder')
    home = timm.create_model(f'local-dir:{tmp_path}/encoder', pretrained=True).eval()
    assert type(home) is timm.models.vision_transformer.VisionTransformer
    torch.testing.assert_close(home.forward_features(m.normalize(x)), m.encoder.forward_features(m.normalize(x)))

def test_pretraining_command(tmp_path):
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(24): Image.fromarray(torch.randint(256, (32,32), dtype=torch.uint8).numpy()).save(photos/f'{i}.png')
    mim_pretrain(method='saim', data=str(photos), epochs=1, batch=8, device='cpu', workers=0, out=tmp_path/'run')
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['method']=='saim' and config['recipe']['betas']==[.9,.95] and config['model']['query_depth']==2
    assert {'encoder', 'metrics.json', 'reconstructions.png', 'log.jsonl', 'last.ckpt'} <= {f.name for f in (tmp_path/'run').iterdir()}

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m,out = run('cuda')
    assert close(out.pred.cpu(), FIX['out/pred'][:,1:]) and close(out.target.cpu(), FIX['out/target'])
    for n,g in GRADS.items(): assert close(grad(m, n), g), n
    with torch.autocast('cuda', torch.bfloat16): assert m(X.cuda(), ORDER.cuda()).loss.isfinite()
