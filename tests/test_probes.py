"Accuracies that say nothing, features of every kind of encoder, and the probes on whatever labels and sizes there are"
import math, warnings
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from mim_nb.features import encoder_parts, features, layer_features, match_channels
from mim_nb.images import ImageSet
from mim_nb.methods import create, methods
from mim_nb.probes import (check_features, check_labels, evaluate, evaluate_layers, knn, labels_like,
                           linear_probe, split, standardize)

PROBES = [knn, lambda *a, **kw: linear_probe(*a, steps=5, **kw)]
SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
OBLONG = dict(SMALL, img_size=(16,32), in_chans=3)

def rand(n, d=8, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

def labelled(n=30, classes=3, size=(16,16), chans=1, names=()):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, chans, *size), generator=g).to(torch.uint8)
    return ImageSet(images, torch.arange(n)%classes, names, 'these')

def encoder(name='mae', **kw):
    torch.manual_seed(0)
    return create(name, **({} if name=='mixmim' and not kw else {**SMALL, **kw}))

def says(f, text):
    with pytest.raises(ValueError) as e: f()
    assert text in str(e.value) and '\n' not in str(e.value)

def knn_slow(f, y, ft, yt, k):
    right = 0
    for q,label in zip(F.normalize(ft, dim=1), yt):
        cos = F.normalize(f, dim=1) @ q
        votes = torch.zeros(int(y.max())+1, dtype=f.dtype)
        for i in cos.argsort(descending=True)[:k]: votes[y[i]] += (cos[i]/.07).exp()
        right += int(votes.argmax()==label)
    return right/len(yt)

# ---- what a probe is given

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), m=st.integers(1, 20), d=st.integers(2, 12), classes=st.integers(1, 6),
       k=st.integers(1, 100), seed=st.integers(0, 99))
def test_probes_take_any_sizes_and_refuse_what_has_no_answer(n, m, d, classes, k, seed):
    g = torch.Generator().manual_seed(seed)
    f,ft = torch.randn(n, d, generator=g, dtype=torch.float64),torch.randn(m, d, generator=g, dtype=torch.float64)
    y,yt = torch.randint(classes, (n,), generator=g),torch.randint(classes, (m,), generator=g)
    unseen = sum(int(c) not in y.tolist() for c in yt)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if len(y.unique())==1: return says(lambda: knn(f, y, ft, yt, k=k), 'one class')
        if unseen>.1*m: return says(lambda: knn(f, y, ft, yt, k=k), 'never shown')
        assert knn(f, y, ft, yt, k=k)==pytest.approx(knn_slow(f, y, ft, yt, k))
        accuracy = linear_probe(f, y, ft, yt, steps=5)
    assert 0<=accuracy<=1 and accuracy*m==pytest.approx(round(accuracy*m), abs=1e-4)

@settings(max_examples=25, deadline=None)
@given(step=st.integers(1, 10**9), seed=st.integers(0, 99))
def test_gaps_between_labels_change_nothing(step, seed):
    f,ft,y,yt = rand(24, seed=seed),rand(9, seed=seed+1),torch.arange(24)%4,torch.arange(9)%4
    for probe in PROBES: assert probe(f, y, ft, yt)==probe(f, y*step, ft, yt*step)

@pytest.mark.parametrize('probe', PROBES)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('where', [0, 2])
def test_features_that_are_not_finite_have_no_accuracy(probe, value, where):
    given = [rand(40), torch.arange(40)%2, rand(10, seed=1), torch.arange(10)%2]
    given[where][3:5,0] = value
    says(lambda: probe(*given), '2 of ')
    says(lambda: standardize(given[0], given[2]), 'are not finite')

@pytest.mark.parametrize('probe', PROBES)
def test_the_same_features_for_all_images_are_worth_a_warning(probe):
    same = rand(1).expand(30, -1)+1e-8*rand(30)
    y = torch.arange(30)%3
    with pytest.warns(UserWarning, match='the encoder has collapsed'): probe(same, y, same, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_features(rand(30)*1e-6, rand(30))                # small is not the same
        check_features(F.pad(rand(30), (1,0), value=1e6), F.pad(rand(30), (1,0)))

@pytest.mark.parametrize('probe', PROBES)
@pytest.mark.parametrize('y,yt,text', [
    (None, [0,1], 'training images have no labels'), ([0,1], None, 'test images have no labels'),
    ([0,-1], [0,1], 'training images have no labels'), ([], [0], 'training images have no labels'),
    ([3,3,3], [3,3], 'one class, 3,'), ([3,3], [3,4], 'one class, 3,'),
    ([0,1,0,1], [2,3], '2, 3 (2 of 2 test images) are never shown'),
    ([0,2,0,2], [0,1,2], '1 (1 of 3 test images)')])
def test_labels_that_allow_no_accuracy(probe, y, yt, text):
    tensors = [o if o is None else torch.tensor(o).long() for o in (y, yt)]
    sizes = [3 if o is None else len(o) for o in tensors]
    says(lambda: probe(rand(sizes[0]), tensors[0], rand(sizes[1]), tensors[1]), text)

def test_a_class_that_few_test_images_have_is_worth_a_warning():
    y,yt = torch.arange(40)%2,torch.cat([torch.arange(29)%2, torch.tensor([2])])
    with pytest.warns(UserWarning, match=r'1 of 30 test images are of classes .* \(owl\)'): check_labels(y, yt, ['cat','dog','owl'])
    with pytest.warns(UserWarning, match='no test image is of the class dog'): check_labels(y, yt*0, ['cat','dog'])
    with pytest.warns(UserWarning): assert knn(rand(40), y, rand(30), yt)<1
    f = torch.eye(3)[y]                                        # the owl is never found, by whatever chance
    with pytest.warns(UserWarning): assert knn(f, y, torch.eye(3)[yt], yt)==pytest.approx(29/30)

def test_k_is_as_many_as_there_are():
    f,y = rand(9),torch.arange(9)%3
    assert knn(f, y, f, y)==knn(f, y, f, y, k=9)==knn(f, y, f, y, k=10**6)
    for k in (0, -1, 2.5, True): says(lambda: knn(f, y, f, y, k=k), 'k must be a whole number')

@pytest.mark.parametrize('wrong', [dict(temperature=0.), dict(temperature=-1.), dict(temperature=math.nan), dict(temperature=.001), dict(chunk=-1)])
def test_settings_of_knn(wrong):
    f,y = rand(9),torch.arange(9)%3
    says(lambda: knn(f, y, f, y, **wrong), f'{next(iter(wrong))} must be')

@pytest.mark.parametrize('wrong', [dict(l2=-1.), dict(l2=math.nan), dict(steps=0)])
def test_settings_of_the_linear_probe(wrong):
    f,y = rand(9),torch.arange(9)%3
    says(lambda: linear_probe(f, y, f, y, **wrong), f'{next(iter(wrong))} must be')

def test_features_of_other_types_and_sizes():
    f,y = rand(20),torch.arange(20)%2
    for probe in PROBES:
        assert probe(f.half(), y, f.half(), y)>=.5 and probe((f*100).int(), y, (f*100).int(), y)>=.5
        says(lambda: probe(f[:,0], y, f, y), 'shape (N,D)')
        says(lambda: probe(f, y, f[:,:4], y), '8 numbers and test features 4')
        says(lambda: probe(f, y[:5], f, y), '20 training features and 5 labels')
    huge = f.sign()*3e38
    for a,b in ((huge, f), (f*0+y[:,None]*1e-7, huge)): says(lambda: linear_probe(a, y, b, y), 'cannot be standardised')

# ---- labels are compared by name

def test_labels_mean_the_same_classes():
    train,test = labelled(30, 3, names=['ant','bee','cat']),labelled(30, 3, names=['cat','ant','bee'])
    assert labels_like(test, train.classes)[:3].tolist()==[2,0,1]
    test.images = train.images[(labels_like(test, train.classes).argsort(stable=True)).argsort()]
    m = encoder()
    same = ImageSet(test.images, labels_like(test, train.classes), train.classes)
    assert evaluate(m, train, test)==evaluate(m, train, same)

def test_disjoint_names_are_named():
    train,test = labelled(30, 3, names=['ant','bee','cat']),labelled(30, 3, names=['dog','elk','fox'])
    says(lambda: evaluate(encoder(), train, test), 'dog, elk, fox (30 of 30 test images) are never shown')

def test_labels_without_names_are_numbers():
    train = labelled(30, 3, names=['ant','bee','cat'])
    for other in (labelled(30, 3), labelled(30, 3, names=['x'])):       # the second has labels beyond its names
        assert torch.equal(labels_like(other, train.classes), other.labels)

def test_labels_are_checked_before_the_encoder_works(monkeypatch):
    monkeypatch.setattr('mim_nb.probes.layer_features', lambda *a: pytest.fail('images were looked at'))
    says(lambda: evaluate(encoder(), labelled(classes=1), labelled()), 'one class')

# ---- features

@pytest.mark.parametrize('name', methods)
def test_images_that_are_not_square(name):
    kw = dict(img_size=(32,64), in_chans=3, patch_size=4, embed_dim=16, depths=(1,1), num_heads=(1,2), window=None) if name=='mixmim' else OBLONG
    torch.manual_seed(0)
    m = create(name, **kw)
    assert encoder_parts(m)[3]==kw['img_size']
    data = labelled(12, 3, size=(20,44), chans=3)
    assert all(len(f)==12 for f in layer_features(m, data))
    exported = m.export_encoder()[0]
    exported.pretrained_cfg = dict(mean=m.mean.flatten().tolist(), std=m.std.flatten().tolist(), input_size=(3,9,9))
    torch.testing.assert_close(features(exported, data), features(m, data), atol=1e-5, rtol=1e-5)
    assert 0<=evaluate(m, data, data)['knn']<=1

def test_a_timm_model_of_another_size_and_depth_of_colour():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(32,48), in_chans=1, depth=1)
    assert encoder_parts(vit)[2:]==(1, (32,48)) and features(vit, labelled(3).images).shape==(3,192)
    net = timm.create_model('resnet10t', in_chans=1)
    assert encoder_parts(net)[2]==1 and features(net, labelled(3).images).shape==(3,512)
    assert encoder_parts(timm.create_model('resnet10t'))[2:]==(3, 176)

@pytest.mark.parametrize('layer', [0, -1, 3, 99, 'x', 1.5, True])
def test_layers_that_are_not_there(layer):
    m,data = encoder(),labelled(6)
    for f in (lambda: features(m, data, layer=layer), lambda: evaluate(m, data, data, layer=layer),
              lambda: evaluate_layers(m, data, data, [1, layer])):
        says(f, 'layer must lie between 1 and 2')

@pytest.mark.parametrize('name', ['resnet10t', 'vit_base_patch16_siglip_224'])
def test_encoders_without_a_class_token(name):
    kw = dict(depth=1, embed_dim=32, num_heads=1, img_size=32) if 'vit' in name else {}
    net = timm.create_model(name, **kw)
    says(lambda: features(net, labelled(2).images, pool='cls'), 'has no class token')
    assert len(features(net, labelled(2).images))==2

def test_features_leave_the_encoder_as_it_was():
    m = encoder().train()
    with pytest.raises(TypeError): features(m, [1,2])
    assert m.encoder.training
    features(m, labelled(3))
    assert m.encoder.training

def test_mistakes_with_features():
    m,data = encoder(),labelled(6)
    for f,text in [(lambda: features(m, data, pool='max'), "pool must be 'mean' or 'cls'"), (lambda: features(m, data.images[:0]), 'no images'),
                   (lambda: features(m, data, batch_size=0), 'batch_size must be'), (lambda: match_channels(torch.rand(1,3,4,4), 4), 'takes images of 4 channels'),
                   (lambda: features(torch.nn.Linear(1, 1), data), 'pass the method itself'), (lambda: evaluate(m, data, data, probes=[]), 'unknown probe'),
                   (lambda: evaluate(m, data, data, probes='magic'), "unknown probe 'magic'")]: says(f, text)
    assert evaluate(m, data, data, probes='knn').keys()=={'knn'}

def test_a_diverged_encoder_has_no_accuracy():
    m = encoder()
    with torch.no_grad(): m.encoder.blocks[1].mlp.fc2.bias[0] = math.nan
    says(lambda: evaluate(m, labelled(), labelled()), 'are not finite')
    assert evaluate(m, labelled(), labelled(), layer=1)['knn']>=0

# ---- few images

@pytest.mark.parametrize('n', [2, 3, 1])
def test_few_images_a_class(n):
    data = labelled(3*n)
    found = evaluate(encoder(), data, data)
    assert found['linear']==1 and found['knn']>=1/3
    first,rest = split(data, .5, seed=1) if n>1 else split(labelled(6), .5)
    assert first.labels.unique().tolist()==[0,1,2] and len(rest)>0

@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=6), share=st.floats(1e-9, 1-1e-9))
def test_no_class_is_empty_in_a_share(counts, share):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    first,_ = split(ImageSet(torch.zeros(len(labels),1,1,1).byte(), labels), share)
    assert len(first.labels.unique())==len(counts)

@pytest.mark.parametrize('wrong', [dict(share=0), dict(share=1), dict(share=-.1), dict(share=math.nan), dict(share='x'), dict(share=.5, seed=-1), dict(share=.5, seed=1.5)])
def test_shares_that_cannot_be(wrong): says(lambda: split(labelled(), **wrong), f'{list(wrong)[-1]} must be')

def test_a_set_with_missing_labels_is_not_split():
    says(lambda: split(ImageSet(torch.zeros(3,1,1,1).byte(), [0,1,-1], name='these'), .5), 'these has no labels')
