"DeepMIM against the authors' numbers, its taps, and its teachers"
import json, shutil
from pathlib import Path
import mim_nb.deepmim, pytest, timm, torch, torch.nn.functional as F
from PIL import Image
from hypothesis import given, settings as few, strategies as st
from safetensors.torch import load_file
from mim_nb.checkpoints import load_official, official_name, save_encoder
from mim_nb.deepmim import DeepMIM, Teacher, spread_taps
from mim_nb.mae import MAE
from mim_nb.mim import leak
from mim_nb.pretrain import mim_pretrain, pretrain
from mim_nb.runfolder import run_settings as settings
from mim_nb.train import param_groups
from mim_nb.visualize import Run

PARITY = Path(__file__).parent/'parity'
FIX = load_file(PARITY/'deepmim_a.safetensors')
WEIGHTS = {k.removeprefix('weights/'): v for k,v in FIX.items() if k.startswith('weights/')}
GRADS = {k.removeprefix('out/grad/'): v for k,v in FIX.items() if k.startswith('out/grad/')}
X,MASK,TARGET = FIX['in/images'],FIX['out/mask'].bool(),FIX['in/teacher_out'][:,1:]

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def run(device='cpu'):
    m = load_official('deepmim', WEIGHTS, mean=0., std=1., num_heads=4, decoder_heads=4).to(device)
    out = m(X.to(device), MASK.to(device), TARGET.to(device)); out.loss.backward()
    return m,out

@pytest.fixture(scope='module')
def ref(): return run()

@pytest.fixture(scope='module')
def school(tmp_path_factory):
    "The folder of a small encoder, 12x12 patches of grey images of 24 pixels, that can teach"
    folder = tmp_path_factory.mktemp('teacher')/'encoder'
    torch.manual_seed(5); save_encoder(MAE(24, 2, embed_dim=24, depth=2, num_heads=2), folder)
    return folder

def grad(m, name): return dict(m.named_parameters())[official_name(DeepMIM, name)].grad.cpu()

def test_taps_predictions_and_losses(ref):
    m,out = ref
    scalars = json.loads((PARITY/'deepmim_a.json').read_text())['scalars']
    rank = FIX['in/noise'].argsort(1)[:,:4].argsort(1)[...,None].expand(-1, -1, 48)     # the reference keeps patches in the order of their noise
    with torch.no_grad(): seen = m.encode(X, m.as_mask(MASK))
    assert m.taps==[6,8,10,12] and m.target_kind=='features'
    for i,(t,z) in enumerate(zip(m.taps, seen)):
        want = FIX[f'out/latent{t}']
        assert close(z, torch.cat([want[:,:1], want[:,1:].gather(1, rank)], 1)), t
        assert close(out.pred[i], FIX[f'out/pred{i+1}'][:,1:]) and abs(out.logs[f'tap{t}']-scalars[f'loss{i+1}'])<=1e-5*scalars[f'loss{i+1}'], t
    assert abs(out.loss.item()-scalars['loss']) <= 1e-5*scalars['loss']

@pytest.mark.parametrize('name', GRADS)
def test_gradients(ref, name): assert close(grad(ref[0], name), GRADS[name])

def test_every_weight_matters(ref):
    m,out = ref
    for n,p in m.named_parameters():
        if not n.startswith(('decoders', 'encoder.norm', 'encoder.cls', 'encoder.blocks.11')): continue
        with torch.no_grad():
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(m(X, MASK, TARGET).pred, out.pred)
            p.copy_(old)
        assert moved, n

def test_full_size():
    full = json.loads((PARITY/'fullsize_deepmim.json').read_text())
    with torch.device('meta'): m = DeepMIM(**DeepMIM.presets['base'], feature_dim=512)
    theirs = {ours: s for k,s in full['state_dict'].items() if (ours := official_name(DeepMIM, k))}
    assert {n: list(p.shape) for n,p in m.named_parameters()}==theirs
    assert sum(p.numel() for p in m.parameters() if p.requires_grad)==full['counts']['trainable_parameters']
    assert sum(p.numel() for p in m.encoder.parameters())==full['counts']['encoder_parameters']
    assert m.taps==[6,8,10,12] and {len(d.blocks) for d in m.decoders}=={4} and m.decoders[0].blocks[0].attn.num_heads==16
    with torch.device('meta'): assert DeepMIM(**DeepMIM.presets['large']).taps==[12,16,20,24]
    assert set(DeepMIM.presets)==set(DeepMIM.recipes)=={'tiny', 'small', 'base', 'large'}

def test_one_tap_is_mae():
    "With the last block as the only tap, DeepMIM on pixels is MAE"
    torch.manual_seed(0); a = MAE(decoder_depth=1)
    b = DeepMIM(taps=[4]); b.load_state_dict({k.replace('decoder.', 'decoders.0.'): v for k,v in a.state_dict().items()})
    x = torch.rand(2,1,28,28); mask = a.sample_mask(2)
    u,v = a(x, mask),b(x, mask)
    assert torch.equal(u.pred, v.pred[0]); torch.testing.assert_close(u.loss, v.loss)

def test_shallow_taps_do_not_see_deeper_blocks_or_the_norm():
    m,x = DeepMIM(taps=[1,3,4]).eval(),torch.rand(2,1,28,28); mask = m.sample_mask(2)
    before = m(x, mask).pred
    torch.nn.init.normal_(m.encoder.norm.weight); torch.nn.init.normal_(m.encoder.blocks[3].mlp.fc2.weight)
    after = m(x, mask).pred
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])

@few(max_examples=8, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(28,4,1), (32,8,3)]), st.sampled_from(['pixels', 'features']))
def test_nothing_leaks(seed, size, kind):
    torch.manual_seed(seed)
    kw = dict(teacher=small_teacher()) if kind=='features' else {}
    m = DeepMIM(*size, embed_dim=32, depth=3, num_heads=2, decoder_dim=16, taps=[1,3], **kw)
    own,other = leak(m, torch.rand(2, size[2], size[0], size[0]))
    assert m.target_kind==kind and own==0 and other>0

def small_teacher(): return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=0)

def test_spread_taps():
    assert [spread_taps(d) for d in (1, 4, 8, 12, 24)]==[[1], [2,3,4], [4,5,7,8], [6,8,10,12], [12,16,20,24]]
    for d in range(1, 40): assert spread_taps(d)[-1]==d and spread_taps(d)[0]>=1

def test_a_teacher_is_frozen_and_not_saved(school):
    m = DeepMIM(teacher=school).train()
    assert m.teacher is None and m.feature_dim==24 and m.target_kind=='features'
    m(torch.rand(2,1,28,28)).loss.backward()
    t = m.teacher.train()
    m.train(); assert not t.training and not t.model.training and m.encoder.training
    assert all(p.grad is None and not p.requires_grad for p in t.parameters())
    assert not any('teacher' in k for k in m.state_dict()) and not {id(p) for p in t.parameters()} & {id(p) for g in param_groups(m, .05) for p in g['params']}
    assert all(p.grad is not None for p in m.parameters() if p.requires_grad)

def test_a_teacher_has_its_own_size_normalisation_and_grid(school):
    t,x = Teacher(timm.create_model(f'local-dir:{school}', pretrained=True)),torch.rand(2,1,24,24)
    assert t.grid==(12,12) and t.width==24 and t.mean.item()==pytest.approx(.286)
    with torch.no_grad(): tokens = t.model.forward_features((x-.286)/.353)[:,1:]
    torch.testing.assert_close(t(x, (12,12)), tokens)
    want = F.interpolate(tokens.mT.unflatten(2, (12,12)), size=(7,7), mode='bicubic', antialias=True).flatten(2).mT
    torch.testing.assert_close(t(x, (7,7)), want)
    torch.testing.assert_close(t(x.expand(-1,3,-1,-1), (7,7)), want)                        # colours that are all the same grey
    assert Teacher(small_teacher())(x, (7,7)).shape==(2,49,12)                               # grey images for a teacher of colours

def test_clip_teaches_through_its_projection():
    small = dict(embed_dim=24, depth=1, num_heads=2)
    clip = timm.create_model('vit_base_patch16_clip_quickgelu_224.openai', **small)
    t = Teacher(clip); x = torch.rand(1,3,224,224)
    assert t.project and t.width==512 and t.grid==(14,14)
    with torch.no_grad(): torch.testing.assert_close(t(x, (14,14)), clip.head(clip.forward_features((x-t.mean)/t.std))[:,1:])
    assert Teacher(clip, project=False).width==24
    tuned = timm.create_model('vit_base_patch16_clip_224.openai_ft_in1k', **small)
    assert not Teacher(tuned).project and not Teacher(timm.create_model('vit_tiny_patch16_224', **small)).project    # classifiers
    assert DeepMIM(teacher='vit_base_patch16_clip_quickgelu_224.openai').feature_dim==512                            # sizes need no weights

@pytest.mark.parametrize('name,width', [('resnet10t', 512), ('convnext_atto', 320)])
def test_teachers_without_tokens(name, width):
    m = DeepMIM(teacher=timm.create_model(name))
    assert m.target(torch.rand(1,1,28,28)).shape==(1,49,width)

def test_pixels_of_every_tap_and_agreement_with_the_teacher(school):
    x = torch.rand(2,1,28,28)
    m = DeepMIM(); mask = m.sample_mask(2); rows = m.pictures(x, mask)
    assert list(rows)[2:]==['after block 2', 'after block 3', 'after block 4'] and all(r.shape==x.shape and 0<=r.min() and r.max()<=1 for r in rows.values())
    torch.testing.assert_close(rows['after block 2'], m.reconstruct(x, mask, tap=0)); torch.testing.assert_close(rows['after block 4'], m.reconstruct(x, mask))
    f = DeepMIM(teacher=school)
    assert len(f.pictures(x, mask))==5
    with pytest.raises(ValueError, match='features are no picture'): f.reconstruct(x, mask)

@pytest.mark.parametrize('taps', [[0,4], [2,5], [4,2], [2,2,4], [], ['2',4], [2.,4], [True,4]])
def test_taps_that_are_not_blocks(taps):
    with pytest.raises(ValueError, match='taps must be blocks of the encoder, 1 to 4'): DeepMIM(taps=taps)

@pytest.mark.parametrize('kw,message', [(dict(taps=[1,3]), 'the last tap must be the last block, 4'), (dict(target_kind='tokens'), "unknown target_kind 'tokens'"),
    (dict(target_kind='features'), 'needs a teacher, or feature_dim'), (dict(target_kind='pixels', teacher='resnet10t'), 'leave out one of the two'), (dict(mask_ratio=.99), 'hides 49 of 49'),
    (dict(teacher='vit_tiny_patch16_225'), "there is no teacher 'vit_tiny_patch16_225'"), (dict(teacher=torch.nn.Linear(2,2)), 'Linear cannot teach')])
def test_what_does_not_fit(kw, message):
    with pytest.raises(ValueError, match=message): DeepMIM(**kw)

def test_teachers_that_do_not_fit(school):
    with pytest.raises(ValueError, match='have 12 numbers and the decoders predict 512: create the method with feature_dim=12'): DeepMIM(feature_dim=512, teacher=small_teacher())
    with pytest.raises(ValueError, match='have 24 numbers and the decoders predict 8'): DeepMIM(feature_dim=8, teacher=school).get_teacher()
    with pytest.raises(ValueError, match='create it with target_kind'): DeepMIM().set_teacher(small_teacher())
    whole = timm.create_model('vit_tiny_patch16_224', img_size=16, embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(ValueError, match='16 pixels as a single patch'): DeepMIM(teacher=whole)

def test_targets_that_do_not_fit():
    m,x = DeepMIM(feature_dim=8),torch.rand(2,1,28,28)
    with pytest.raises(ValueError, match='has no teacher'): m(x)
    with pytest.raises(ValueError, match=r'must have shape \(2, 49, 8\), got \(2, 49, 9\)'): m(x, target=torch.rand(2,49,9))

def test_weights_that_cannot_be_had(monkeypatch):
    m = DeepMIM(teacher='vit_base_patch16_clip_quickgelu_224.openai')
    def offline(*args, **kw): raise OSError('no network\nand more')
    monkeypatch.setattr(mim_nb.deepmim, 'check_reachable', offline)
    with pytest.raises(ValueError, match=r"the weights of the teacher 'vit_base.*' cannot be had \(OSError: no network\): give the folder .* or learn from pixels"): m(torch.rand(2,1,28,28))

def test_bfloat16_keeps_the_loss_in_float32(ref):
    with torch.autocast('cpu', torch.bfloat16): loss = ref[0](X, MASK, TARGET).loss
    assert loss.dtype==torch.float32 and abs(loss-ref[1].loss)<.05

def test_pretraining_with_a_teacher(tmp_path, school):
    "A run knows its teacher by its name alone, and can be shown and resumed"
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(24): Image.fromarray(torch.randint(256, (32,32), dtype=torch.uint8).numpy()).save(photos/f'{i}.png')
    config = settings('deepmim', model=dict(teacher=str(school)), recipe=dict(epochs=1, batch_size=8), data=str(photos), seed=0)
    pretrain(tmp_path/'run', config, device='cpu', workers=0)
    assert json.loads((tmp_path/'run'/'config.json').read_text())['model']['teacher']==str(school)
    assert {'tap2', 'tap3', 'tap4'} <= set(json.loads((tmp_path/'run'/'log.jsonl').read_text().splitlines()[0]))
    assert len(Run(tmp_path/'run', 'cpu').method.pictures(torch.rand(2,1,28,28), MAE().sample_mask(2)))==5
    mim_pretrain('deepmim', data=str(photos), epochs=1, batch=8, device='cpu', workers=0, out=tmp_path/'pixels')
    assert {'encoder', 'metrics.json', 'reconstructions.png'} <= {f.name for f in (tmp_path/'pixels').iterdir()}
    shutil.rmtree(tmp_path/'run')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_parity_on_cuda(school):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m,out = run('cuda')
    for i in range(4): assert close(out.pred[i].cpu(), FIX[f'out/pred{i+1}'][:,1:])
    for n,g in GRADS.items(): assert close(grad(m, n), g), n
    f = DeepMIM(teacher=school).cuda()
    with torch.autocast('cuda', torch.bfloat16): assert f(torch.rand(2,1,28,28, device='cuda')).loss.isfinite()
