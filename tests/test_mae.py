"MAE against the authors' numbers, and that hidden patches are truly absent"
import json
from pathlib import Path
import pytest, timm, torch
from PIL import Image
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from mim_nb.checkpoints import load_official, official_name, save_encoder
from mim_nb.mae import Decoder, MAE, fill, visible
from mim_nb.masks import make_mask, random_mask
from mim_nb.mim import leak
from mim_nb.patches import patchify, unpatchify
from mim_nb.pretrain import mim_pretrain

PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'mae_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}
X,MASK = FIX['in/images'],FIX['out/mask'].bool()

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def run(device='cpu'):
    m = load_official('mae', WEIGHTS, mean=0., std=1., num_heads=4, decoder_heads=4).to(device)
    out = m(X.to(device), MASK.to(device)); out.loss.backward()
    return m,out

@pytest.fixture(scope='module')
def ref(): return run()

def grad(m, name): return dict(m.named_parameters())[official_name(MAE, name)].grad.cpu()

def in_rows(latent, noise):
    "The reference keeps patches in the order of their noise; ours are in row order"
    rank = noise.argsort(1)[:,:latent.shape[1]-1].argsort(1)
    return torch.cat([latent[:,:1], latent[:,1:].gather(1, rank[...,None].expand(-1, -1, latent.shape[-1]))], 1)

def test_latent_prediction_and_loss(ref):
    m,out = ref
    loss = json.loads((PARITY/'mae_a.json').read_text())['scalars']['loss']
    with torch.no_grad(): assert close(m.encode(X, make_mask(MASK)), in_rows(FIX['out/latent'], FIX['in/noise']))
    assert close(out.pred, FIX['out/pred']) and abs(out.loss.item()-loss) <= 1e-5*loss

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(grad(ref[0], name), GRADS[name])

def test_fixed_positions(ref):
    assert close(ref[0].decoder.pos_embed, WEIGHTS['decoder_pos_embed']) and close(ref[0].encoder.pos_embed, WEIGHTS['pos_embed'])

def test_every_weight_matters(ref):
    m,_ = ref
    for n,p in m.named_parameters():
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(X, MASK).pred, FIX['out/pred'])
            p.copy_(old)
        assert moved, n

def test_full_size():
    full = json.loads((PARITY/'fullsize_mae.json').read_text())
    with torch.device('meta'): m = MAE(**MAE.presets['base'])
    theirs = {ours: s for k,s in full['state_dict'].items() if (ours := official_name(MAE, k))}
    assert {n: list(p.shape) for n,p in m.named_parameters()}==theirs
    assert sum(p.numel() for p in m.parameters() if p.requires_grad)==full['counts']['trainable_parameters']
    assert sum(p.numel() for p in m.encoder.parameters())==full['counts']['encoder_parameters']
    assert m.decoder.blocks[0].attn.num_heads==16 and m.sample_mask.__self__.mask_ratio==.75
    with torch.device('meta'): assert len(MAE(**MAE.presets['large']).encoder.blocks)==24
    assert set(MAE.presets)==set(MAE.recipes)=={'tiny', 'small', 'base', 'large'}

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 4), st.integers(2, 30), st.floats(.05, .95))
def test_visible_and_fill_undo_each_other(seed, n, length, ratio):
    torch.manual_seed(seed)
    hidden = min(max(1, round(length*ratio)), length-1)
    mask = torch.rand(n, length).argsort(1)<hidden
    x,token = torch.randn(n, length, 5),torch.randn(1, 1, 5)
    value = make_mask(mask)
    seen = visible(x, value)
    assert seen.shape==(n, length-hidden, 5) and torch.equal(seen, torch.stack([r[~k] for r,k in zip(x, mask)]))
    want = torch.stack([torch.stack([token[0,0] if h else v for v,h in zip(*p)]) for p in zip(x, mask)])
    assert torch.equal(fill(seen, token, mask, value.shown_at), want) and torch.equal(fill(x, token, mask), want)

def test_decoder_for_all_or_visible_tokens_and_without_cls():
    torch.manual_seed(0)
    for prefix in (0, 1, 2):
        d = Decoder(12, 7, (3,4), dim=16, depth=1, prefix=prefix, eps=1e-5)
        torch.nn.init.normal_(d.mask_token)
        z,mask = torch.randn(2, prefix+12, 12),make_mask(random_mask(2, 12, .5))
        seen = torch.cat([z[:,:prefix], visible(z[:,prefix:], mask)], 1)
        assert d(z, mask.hidden).shape==(2, 12, 7) and d.norm.eps==1e-5
        torch.testing.assert_close(d(seen, mask.hidden, mask.shown_at), d(z, mask.hidden))

def test_hidden_pixels_do_not_reach_the_encoder():
    m,x = MAE().eval(),torch.rand(2,1,28,28)
    mask = m.sample_mask(2)
    other = unpatchify(torch.where(mask.hidden[...,None], torch.rand(2,49,16), patchify(x, 4)), 4)
    assert torch.equal(m.encode(m.normalize(x), mask), m.encode(m.normalize(other), mask))

def test_order_of_visible_tokens_does_not_matter(ref):
    m,_ = ref
    t = m.embed(X, make_mask(MASK)); order = torch.randperm(t.shape[1])
    torch.testing.assert_close(m.encoder.blocks(t[:,order]), m.encoder.blocks(t)[:,order])

@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(28,4,1), (32,8,3), (24,4,3)]))
def test_nothing_leaks(seed, size):
    torch.manual_seed(seed)
    own,other = leak(MAE(*size, embed_dim=32, depth=2, num_heads=2, decoder_dim=16, decoder_depth=1), torch.rand(2, size[2], size[0], size[0]))
    assert own==0 and other>0

def test_nothing_hidden_at_inference():
    m = MAE().eval(); x = torch.rand(2,1,28,28)
    torch.testing.assert_close(m.encode(m.normalize(x), make_mask(torch.zeros(2, 49, dtype=torch.bool))), m.encoder.forward_features(m.normalize(x)))

def test_targets_are_normalised_by_unbiased_variance():
    m,x = MAE(),torch.rand(2,1,28,28); t = m.target(x)
    torch.testing.assert_close(t.var(-1), torch.ones(2,49), rtol=1e-3, atol=1e-3)
    plain = MAE(norm_pix=False)
    torch.testing.assert_close(plain.to_images(plain.target(x), x, torch.ones(2,49,dtype=torch.bool)), x)

@pytest.mark.parametrize('norm_pix', [True, False])
def test_perfect_predictions_give_back_the_image(norm_pix):
    m,x = MAE(32, 8, 3, norm_pix=norm_pix),torch.rand(2,3,32,32)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(m.to_images(m.target(x), x, hidden), x, rtol=1e-4, atol=1e-5)
    mask = m.sample_mask(2).hidden; r = m.reconstruct(x, mask)
    assert 0<=r.min() and r.max()<=1
    torch.testing.assert_close(patchify(r, 8)[~mask], patchify(x, 8)[~mask], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('kw,message', [(dict(mask_ratio=.99), 'hides 49 of 49 patches'), (dict(mask_ratio=1.), 'greater than 0 and less than 1'), (dict(mask_ratio=0.), 'greater than 0 and less than 1'),
    (dict(img_size=8, mask_ratio=.9), 'one visible'), (dict(decoder_dim=66), 'multiple of 4'), (dict(decoder_dim=64, decoder_heads=5), 'cannot be cut into 5 heads'),
    (dict(decoder_depth=-1), 'decoder_depth must be a whole number of at least 0'), (dict(img_size=30), 'not a multiple of the patch')])
def test_what_does_not_fit(kw, message):
    with pytest.raises(ValueError, match=message): MAE(**kw)

def test_masks_that_do_not_fit():
    m,x = MAE(),torch.rand(2,1,28,28); good = m.sample_mask(2).hidden
    uneven = good.clone(); uneven[0,uneven[0].nonzero()[0]] = False
    for mask,message in ((uneven, 'same number of patches'), (torch.ones_like(good), 'at least one'), (good.float(), 'A mask is bool'), (good[:1], r'shape \(2, 49\)'), (good[:,:9], r'shape \(2, 49\)'), (torch.zeros_like(good), 'hides nothing')):
        with pytest.raises(ValueError, match=message): m(x, mask)

def test_bfloat16_keeps_the_loss_in_float32(ref):
    with torch.autocast('cpu', torch.bfloat16): loss = ref[0](X, MASK).loss
    assert loss.dtype==torch.float32 and abs(loss-ref[1].loss)<.02

def test_pretraining_command_and_export(tmp_path):
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(24): Image.fromarray(torch.randint(256, (32,32), dtype=torch.uint8).numpy()).save(photos/f'{i}.png')
    mim_pretrain('mae', data=str(photos), epochs=1, batch=8, device='cpu', workers=0, out=tmp_path/'run')
    assert {'encoder', 'metrics.json', 'reconstructions.png', 'log.jsonl', 'last.ckpt'} <= {f.name for f in (tmp_path/'run').iterdir()}
    m = MAE().eval(); save_encoder(m, tmp_path/'mine'); x = torch.rand(2,1,28,28)
    torch.testing.assert_close(timm.create_model(f'local-dir:{tmp_path}/mine', pretrained=True).eval()(m.normalize(x)), m.encoder(m.normalize(x)))
    with pytest.raises(ValueError, match='between 0 and 1'): mim_pretrain('mae', data=str(photos), mask=1.5, device='cpu', out=tmp_path/'bad')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m,out = run('cuda')
    assert close(out.pred.cpu(), FIX['out/pred'])
    for n,g in GRADS.items(): assert close(grad(m, n), g), n
