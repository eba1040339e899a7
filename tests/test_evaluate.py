"What fine-tuning and the probes promise, on encoders so small that a test takes a second"
import json, os, signal
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from mim_nb.checkpoints import save_encoder
from mim_nb.data import ImageSet, LazySet, Clothes, load_data
from mim_nb.evaluate import Classifier, evaluate_layers, features, finetune, knn, layer_features, mim_evaluate, split
from mim_nb.distort import Distorted
from mim_nb.methods import create, methods
from mim_nb.runs import Stopped

SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
FAST = dict(epochs=1, warmup_epochs=0, batch_size=16, device='cpu', bar=False)

@pytest.fixture(scope='module')
def clothes(): return load_data('fashion_mnist').take(slice(0, 64))

def small(name='mae'): torch.manual_seed(0); return create(name, **({} if name=='mixmim' else SMALL))

@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), share=st.floats(.01, .99), seed=st.integers(0, 9))
def test_split_keeps_proportions_and_loses_nothing(counts, share, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    data = ImageSet(torch.arange(len(labels))[:,None,None,None].byte(), labels)
    a,b = split(data, share, seed)
    assert a.labels.bincount(minlength=len(counts)).tolist()==[max(1, round(share*n)) for n in counts]
    assert sorted(a.images.flatten().tolist()+b.images.flatten().tolist())==list(range(len(labels)))

def test_knn_does_not_depend_on_the_chunk():
    torch.manual_seed(0); f,y = torch.randn(300, 8),torch.randint(5, (300,))
    assert len({knn(f, y, f[:50]+.3, y[:50], chunk=c) for c in (None, 1, 7, 50)})==1

@pytest.mark.parametrize('name', methods)
def test_every_encoder_is_examined_and_fine_tuned(name, clothes):
    m = small(name)
    assert all(0<=r[p]<=1 for r in evaluate_layers(m, clothes, clothes) for p in ('knn','linear'))
    c = finetune(m, clothes, layer_decay=.5, **FAST)
    before,after = Classifier(m, 10).net.state_dict(),c.net.state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before if k.endswith(('mlp.fc1.weight', 'patch_embed.proj.weight')))
    assert 0<=c.accuracy(clothes)<=1

@pytest.mark.parametrize('name', ['beit', 'saim'])
def test_the_head_is_behind_the_average_and_the_norm(name, clothes):
    m = small(name).eval(); c = Classifier(m, 10).eval()
    x = c.normalize(torch.rand(3, 1, 16, 16))
    z = m.export_encoder()[0].eval().forward_intermediates(x, indices=[1], norm=False, intermediates_only=True)[0]
    with torch.no_grad(): torch.testing.assert_close(c.logits(x), c.net.head(m.encoder.norm(z.mean((2,3)))), atol=1e-5, rtol=1e-5)
    cls = Classifier(m, 10, pool='cls').eval()
    with torch.no_grad(): torch.testing.assert_close(cls.logits(x), cls.net.head(m.export_encoder()[0].eval().forward_features(x)[:,0]), atol=1e-5, rtol=1e-5)

def test_layers_learn_at_their_own_rate(clothes, monkeypatch):
    seen = {}
    class Spy(torch.optim.SGD):
        def step(self, *a): seen.update({id(p): g['lr'] for g in self.param_groups for p in g['params']}); super().step(*a)
    monkeypatch.setattr('mim_nb.finetune.create_optimizer_v2', lambda net, opt, lr, weight_decay, layer_decay: Spy(
        [dict(g, lr=lr) for g in timm.optim.param_groups_layer_decay(net, weight_decay, layer_decay=layer_decay)]))
    c = finetune(small(), clothes, layer_decay=.5, **FAST)
    rate = lambda p: seen[id(p)]/seen[id(c.net.head.weight)]
    assert [rate(c.net.patch_embed.proj.weight), *(rate(b.mlp.fc1.weight) for b in c.net.blocks)]==pytest.approx([.125, .25, .5])

def test_a_frozen_encoder_stays_as_it_is(clothes):
    m = small(); c = finetune(m, clothes, 'lars_tiny', **FAST)
    for k,v in m.export_encoder()[0].state_dict().items():
        if k in c.net.state_dict(): assert torch.equal(c.net.state_dict()[k], v), k
    assert c.head[1].weight.abs().max()>0 and not c.net.training

def test_fine_tuning_resumes_to_the_same_bits(clothes, tmp_path, monkeypatch):
    kw = dict(FAST, epochs=2, batch_size=8, mixup=.8, cutmix=1., erase=.5, drop_path=.1, distort='rand-m9-mstd0.5-inc1', ema=.9)
    whole = finetune(small(), clothes, **kw)
    forward,calls = Classifier.forward,[]
    def unplugged(self, *a):
        calls.append(0)
        if len(calls)==5: os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *a)
    monkeypatch.setattr(Classifier, 'forward', unplugged)
    with pytest.raises(Stopped): finetune(small(), clothes, folder=tmp_path, **kw)
    resumed = finetune(small(), clothes, folder=tmp_path, resume=True, **kw)
    assert len(calls)==16
    for k,v in whole.state_dict().items(): assert torch.equal(v, resumed.state_dict()[k]), k

def test_distorted_images_follow_from_their_batch(clothes):
    colour = ImageSet(clothes.images.expand(-1,3,-1,-1), clothes.labels)
    for d in (Distorted(clothes), Distorted(colour)):
        a,b = ([x for x,_ in d.__getitems__(range(16))] for _ in range(2))
        assert all(torch.equal(p, q) for p,q in zip(a, b)) and a[0].shape==d.data.images[0].shape and a[0].dtype==torch.uint8
        assert any(not torch.equal(p, q) for p,q in zip(a, d.data.images))

def test_grey_and_colour_meet(clothes):
    colour = ImageSet(clothes.images.expand(-1,3,-1,-1), clothes.labels)
    m = small()
    torch.testing.assert_close(features(m, colour.images), features(m, clothes.images))
    wide = create('mae', **SMALL, in_chans=3)
    assert features(wide, clothes.images).shape==(64,32) and 0<=finetune(wide, clothes, **FAST).accuracy(clothes)<=1

def test_images_that_are_not_in_memory(clothes):
    m,lazy = small(),LazySet(Clothes(), 28, 1, 'clothes').take(slice(0, 64))
    torch.testing.assert_close(features(m, lazy), features(m, clothes))
    c = finetune(m, clothes, **FAST)
    assert c.accuracy(lazy)==c.accuracy(clothes)

def test_layers_in_one_pass_are_those_of_several(clothes):
    m = small('mixmim')
    for l,f in enumerate(layer_features(m, clothes.images)): torch.testing.assert_close(f, features(m, clothes.images, layer=l+1))

@pytest.mark.parametrize('kw,says', [(dict(probe='finetune,lars', epochs=1, labels=.05), ('finetune','lars')), (dict(layer='all', labels=.02), ('knn','linear'))])
def test_mim_evaluate_writes_what_it_prints(tmp_path, capsys, kw, says):
    save_encoder(small(), tmp_path/'encoder')
    result = mim_evaluate(str(tmp_path), device='cpu', out=str(tmp_path/'r.json'), **kw)
    written,printed = json.loads((tmp_path/'r.json').read_text()),capsys.readouterr().out
    assert tuple(result)==says and all(written[k]==result[k] and k in printed for k in says)
    assert written['labels']==kw['labels'] and (kw.get('layer')!='all' or len(result['knn'])==2)

def test_mistakes_get_one_sentence(clothes, tmp_path):
    m,none = small(),ImageSet(clothes.images, name='these')
    for f,says in [(lambda: finetune(m, none), 'these has no labels'), (lambda: split(none, .5), 'these has no labels'),
                   (lambda: finetune(m, clothes, **FAST | dict(batch_size=15), mixup=.8), 'take an even batch_size'),
                   (lambda: evaluate_layers(m, clothes, none), 'test images have no labels'),
                   (lambda: evaluate_layers(m, clothes.take(clothes.labels<5), clothes), 'test images have 10 classes and the training images 5'),
                   (lambda: finetune(m, clothes.take(clothes.labels<5), **FAST).accuracy(clothes), '10 classes and the head 5'),
                   (lambda: Classifier(m, 10, pool='max'), "pool must be 'mean' or 'cls'")]:
        with pytest.raises(ValueError) as e: f()
        assert says in str(e.value) and '\n' not in str(e.value)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_fine_tuning_on_cuda(clothes):
    c = finetune(small(), clothes, **FAST | dict(device='cuda'), mixup=.8, erase=.5, ema=.9)
    assert 0<=c.accuracy(clothes, ema=True)<=1
