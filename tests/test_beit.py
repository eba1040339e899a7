"BEiT against the authors' numbers, and properties over many masks"
import json
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from mim_nb.beit import BEiT
from mim_nb.checkpoints import load_official, official_name
from mim_nb.masks import make_mask
from mim_nb.mim import leak
from mim_nb.tokenizers import DVAE

PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'beit_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

@pytest.fixture(scope='module')
def ref():
    m = load_official('beit', WEIGHTS, mean=0., std=1.)
    out = m(FIX['in/images'], mask=FIX['in/bool_masked_pos'], target=FIX['in/labels'])
    out.loss.backward()
    return m,out

def test_features_logits_and_loss(ref):
    m,out = ref
    scalars = json.loads((PARITY/'beit_a.json').read_text())['scalars']
    with torch.no_grad(): assert close(m.encode(FIX['in/images'], m.as_mask(FIX['in/bool_masked_pos'])), FIX['out/features'])
    assert close(out.pred, FIX['out/logits_masked'])
    assert abs(out.loss.item()-scalars['loss']) <= 1e-5*scalars['loss'] and out.logs['accuracy']==scalars['mlm_acc']

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(dict(ref[0].named_parameters())[official_name(BEiT, name)].grad, GRADS[name])

def test_every_weight_matters(ref):
    "Parity would be worth little if the numbers did not depend on a weight: nudge each, and the logits move"
    m,out = ref
    for n,p in m.named_parameters():
        if n=='encoder.patch_embed.proj.bias': continue
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(FIX['in/images'], mask=FIX['in/bool_masked_pos'], target=FIX['in/labels']).pred, FIX['out/logits_masked'])
            p.copy_(old)
        assert moved, n

@pytest.mark.parametrize('preset', ['base', 'large'])
def test_full_size(preset):
    with torch.device('meta'): m = BEiT(**BEiT.presets[preset])
    full = json.loads((PARITY/'fullsize_beit.json').read_text())
    if preset=='base':
        theirs = {ours: s for k,s in full['state_dict'].items() if (ours := official_name(BEiT, k))}
        assert {n: list(p.shape) for n,p in m.named_parameters()}==theirs
        assert sum(p.numel() for p in m.parameters())==full['counts']['trainable_parameters']
        assert sum(p.numel() for p in m.encoder.parameters())==full['counts']['encoder_parameters']
    assert m.grid==(14,14) and m.num_masked==75 and m.min_block==16

def test_loss_is_cross_entropy_at_hidden_places_only(ref):
    m,_ = ref
    mask,target = FIX['in/bool_masked_pos'],FIX['in/labels']
    other = torch.where(mask, target, (target+1)%128)
    assert torch.equal(m(FIX['in/images'], mask, target).loss, m(FIX['in/images'], mask, other).loss)
    z = m.encode(FIX['in/images'], m.as_mask(mask))
    full = F.cross_entropy(m.head(z[:,1:]).transpose(1,2), target, reduction='none')
    torch.testing.assert_close(full[mask].mean(), m(FIX['in/images'], mask, target).loss)

@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(28,4,1), (32,8,3), (24,4,3)]))
def test_nothing_leaks(seed, size):
    torch.manual_seed(seed)
    s,p,c = size
    m = BEiT(s, p, c, embed_dim=32, depth=2, num_heads=2, vocab_size=16, tokenizer=DVAE(s, p, c, 16, width=16, depth=1), mask_ratio=.4)
    torch.nn.init.normal_(m.encoder.rel_pos_bias.relative_position_bias_table)
    own,other = leak(m, torch.rand(2,c,s,s))
    assert own==0 and other>0

def test_tokenizer_is_frozen_and_in_eval_mode():
    m = BEiT(tokenizer=DVAE()).train()
    assert m.encoder.training and not m.tokenizer.training
    m(torch.rand(2,1,28,28)).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in m.tokenizer.parameters())
    assert all(p.grad is not None for n,p in m.named_parameters() if 'tokenizer' not in n)

def test_nothing_hidden_at_inference():
    m = BEiT().eval(); x = torch.rand(2,1,28,28)
    none = torch.zeros(2, 49, dtype=torch.bool)
    torch.testing.assert_close(m.encode(m.normalize(x), make_mask(none)), m.encoder.forward_features(m.normalize(x)))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m = load_official('beit', WEIGHTS, mean=0., std=1.).cuda()
    x,mask,target = (FIX[f'in/{k}'].cuda() for k in ('images', 'bool_masked_pos', 'labels'))
    out = m(x, mask, target); out.loss.backward()
    assert close(out.pred.cpu(), FIX['out/logits_masked'])
    for k,g in GRADS.items(): assert close(dict(m.named_parameters())[official_name(BEiT, k)].grad.cpu(), g), k
    with torch.autocast('cuda', torch.bfloat16): assert m(x, mask, target).loss.isfinite()

def test_first_weights_grow_with_init_std():
    "All that is drawn is five times as large, and nothing else differs"
    def fresh(std): torch.manual_seed(0); return dict(BEiT(embed_dim=32, depth=2, num_heads=2, init_std=std).named_parameters())
    small,large = fresh(.02),fresh(.1)
    for n,p in small.items():
        drawn = p.ndim>1 and 'bias' not in n
        torch.testing.assert_close(large[n], 5*p if drawn else p)
        if drawn: assert 0<p.abs().max()<=.02
