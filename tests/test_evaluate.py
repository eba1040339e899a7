"What fine-tuning and the probes promise, on encoders so small that a test takes a second"
import json, math, os, signal, socket, sys, time
from pathlib import Path
import mim_nb.evaluate, mim_nb.hub, pytest, timm, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from mim_nb.checkpoints import save_encoder
from mim_nb.data import ImageSet, LazySet, Clothes, load_data
from mim_nb.evaluate import (Classifier, evaluate_layers, features, finetune, knn, layer_features, load_encoder, mim_evaluate,
                             mim_evaluate_cli, split)
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
    assert written['made_by']=='mim_evaluate' and written['labels']==kw['labels'] and (kw.get('layer')!='all' or len(result['knn'])==2)

# ---- the command

@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "A run's folder with an encoder in it"
    run = tmp_path_factory.mktemp('run')
    save_encoder(small(), run/'encoder')
    (run/'log.jsonl').write_text('{"step": 1}\n')
    return run

def photos(root, **splits):
    "Folders of images: split -> class -> how many"
    torch.manual_seed(0)
    for split_,classes in splits.items():
        for k,(name,n) in enumerate(classes.items()):
            folder = root/split_/name
            folder.mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 80, (16,16))+40*k
                Image.fromarray(x.byte().numpy()).save(folder/f'{i}.png')
    return root

def command(monkeypatch, capsys, *args):
    "The exit code and the last line of the command's error"
    monkeypatch.setattr(sys, 'argv', ['mim_evaluate', *map(str, args), '--device', 'cpu'])
    code = mim_evaluate_cli()
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return code,err.strip().splitlines()[-1] if err.strip() else ''

@pytest.mark.parametrize('args,says', [
    (['--probe', 'magic'], "unknown probe 'magic'"), (['--probe', ''], "unknown probe ''"), (['--probe', 'knn,,linear'], "unknown probe ''"),
    (['--recipe', 'biet'], "unknown recipe 'biet'"), (['--recipe', 'lars'], "unknown recipe 'lars'"), (['--pool', 'max'], "pool must be 'mean' or 'cls'"),
    (['--layer', '0'], 'layer must be'), (['--layer', '-1'], 'layer must be'), (['--layer', 'x'], 'or all'), (['--layer', '1.5'], 'or all'), (['--layer', '²'], 'or all'),
    (['--labels', '0'], 'labels must be'), (['--labels', '2'], 'labels must be'), (['--labels', 'nan'], 'labels must be'), (['--labels', '-.5'], 'labels must be'),
    (['--epochs', '-1'], 'epochs must be'), (['--epochs', '0'], 'epochs must be'), (['--epochs', 'nan'], 'epochs must be'), (['--epochs', 'inf'], 'epochs must be'),
    (['--seed', '-1'], 'seed must be'), (['--data', ''], 'the name of the data is empty'), (['--data', ' '], 'the name of the data is empty'),
    (['--out', 'no/such/folder/r.json'], 'there is no folder no/such/folder'), (['--out', ''], 'there is no folder'), (['--out', '.'], 'will not be overwritten'),
    (['--out', '/dev/null'], 'will not be overwritten'), (['--out', 'config.json'], 'a file of a run')])
def test_bad_requests_are_found_before_anything_is_loaded(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mim_nb.evaluate, 'load_encoder', lambda *a: pytest.fail('an encoder was loaded'))
    code,err = command(monkeypatch, capsys, *args)
    assert code==1 and says in err, err

def test_an_unknown_device_is_found_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(mim_nb.evaluate, 'load_encoder', lambda *a: pytest.fail('an encoder was loaded'))
    for device in ('gpu', 'cuda:99', ''):
        with pytest.raises(ValueError, match='device|CUDA'): mim_evaluate('run', device=device)

@pytest.mark.parametrize('kw,says', [(dict(layer='3'), 'between 1 and 2'), (dict(layer='99'), 'between 1 and 2')])
def test_what_the_encoder_lacks_is_found_before_images_are_loaded(monkeypatch, encoder, kw, says):
    monkeypatch.setattr(mim_nb.evaluate, 'load_like', lambda *a: pytest.fail('images were loaded'))
    with pytest.raises(ValueError, match=says): mim_evaluate(str(encoder), device='cpu', **kw)

def test_an_encoder_without_class_token(monkeypatch, tmp_path):
    monkeypatch.setattr(mim_nb.evaluate, 'load_like', lambda *a: pytest.fail('images were loaded'))
    save_encoder(small('mixmim'), tmp_path/'encoder')
    with pytest.raises(ValueError, match='has no class token'): mim_evaluate(str(tmp_path), pool='cls', device='cpu')

# ---- which encoder

@pytest.mark.parametrize('name,error,says', [
    ('', ValueError, 'is empty'), (' ', ValueError, 'is empty'), ('no_such_model', ValueError, 'neither a folder nor a model'), ('x\0y', ValueError, 'neither a folder'),
    ('local-dir:nowhere', FileNotFoundError, 'holds no encoder'), ('.', FileNotFoundError, 'holds no encoder'), ('a:b', ValueError, 'neither a folder'),
    ('resnet10t.no_such_tag', OSError, 'could not load the weights'), ('mixmim_base', OSError, 'could not load the weights')])
def test_names_that_are_no_encoder(tmp_path, monkeypatch, name, error, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as e: load_encoder(name)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['resnet10t', 'hf-hub:some/where'])
def test_without_a_network_one_sentence_comes_soon(monkeypatch, tmp_path, name):
    def no_network(*a, **kw): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'create_connection', no_network)
    monkeypatch.setattr(mim_nb.hub, 'getproxies', dict)
    monkeypatch.setattr(mim_nb.hub, 'try_to_load_from_cache', lambda *a: None)
    monkeypatch.setattr(timm, 'create_model', lambda *a, **kw: pytest.fail('timm was asked'))
    start = time.time()
    with pytest.raises(OSError, match='could not load the weights of .*Name or service not known.*check the name and the network'): load_encoder(name)
    assert time.time()-start<5

def test_cached_weights_need_no_network(monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', lambda *a, **kw: pytest.fail('the network was asked'))
    monkeypatch.setattr(mim_nb.hub, 'try_to_load_from_cache', lambda repo, f: f'/cache/{f}')
    monkeypatch.setattr(timm, 'create_model', lambda *a, **kw: torch.nn.Linear(1, 1))
    assert not load_encoder('resnet10t').training

def test_exported_encoders_of_all_methods_come_back(tmp_path):
    for name in methods:
        m = small(name).eval()
        save_encoder(m, tmp_path/name/'encoder')
        x = torch.rand(2, 1, *m.img_size)
        with torch.no_grad(): torch.testing.assert_close(load_encoder(tmp_path/name).forward_features(x), m.export_encoder()[0].forward_features(x), atol=1e-5, rtol=1e-5)

# ---- where the result goes

OTHERS = {'notes.txt': 'mine', 'r.json': '{"knn": 1}', 'list.json': '[1, 2]', 'cut.json': '{"made_by": "mim_ev', 'empty.json': '',
          'bytes.json': '\xff\xfe', 'other.json': '{"made_by": "me"}'}

@pytest.mark.parametrize('name', OTHERS)
def test_no_other_file_is_overwritten(tmp_path, encoder, name):
    (tmp_path/name).write_text(OTHERS[name], 'latin-1')
    with pytest.raises(FileExistsError, match='was not written by mim_evaluate'): mim_evaluate(str(encoder), device='cpu', out=str(tmp_path/name))
    assert (tmp_path/name).read_text('latin-1')==OTHERS[name] and os.listdir(tmp_path)==[name]

def test_no_file_of_a_run_is_overwritten(encoder, tmp_path):
    files = {p: p.read_bytes() for p in encoder.rglob('*') if p.is_file()}
    for p in [*files, encoder/'metrics.json', encoder/'encoder/new.json', encoder/'encoder']:
        with pytest.raises((ValueError, OSError)): mim_evaluate(str(encoder), device='cpu', out=str(p))
    (tmp_path/'link.json').symlink_to(encoder/'encoder/config.json')
    with pytest.raises(FileExistsError): mim_evaluate(str(encoder), device='cpu', out=str(tmp_path/'link.json'))
    assert {p: p.read_bytes() for p in encoder.rglob('*') if p.is_file()}==files

def test_an_earlier_result_is_replaced_and_a_later_file_is_not(tmp_path, encoder, monkeypatch):
    out,kw = tmp_path/'r.json',dict(probe='knn', labels=.02, device='cpu')
    mim_evaluate(str(encoder), out=str(out), **kw)
    mim_evaluate(str(encoder), out=str(out), **kw, layer=1)
    assert json.loads(out.read_text())['layer']==1 and os.listdir(tmp_path)==['r.json']
    def meanwhile(*a, **kw): (tmp_path/'s.json').write_text('mine'); return [dict(knn=1.)]
    monkeypatch.setattr(mim_nb.evaluate, 'evaluate_layers', meanwhile)
    with pytest.raises(FileExistsError): mim_evaluate(str(encoder), out=str(tmp_path/'s.json'), **kw)
    assert (tmp_path/'s.json').read_text()=='mine'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write everywhere')
def test_a_folder_that_may_not_be_written(tmp_path, encoder):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match='may not write'): mim_evaluate(str(encoder), out=str(tmp_path/'r.json'), device='cpu')
    finally: tmp_path.chmod(0o700)

# ---- labels that say nothing, and few of them

@pytest.mark.parametrize('splits,says', [
    (dict(train=dict(cat=9), test=dict(cat=3)), 'all training images are of one class, cat'),
    (dict(train=dict(cat=5, dog=5), test=dict(ant=3, bee=3)), 'ant, bee (6 of 6 test images) are never shown'),
    (dict(train=dict(cat=5, dog=5), test=dict(cat=3, dog=3, elk=3)), 'elk (3 of 9 test images)')])
def test_folders_that_allow_no_accuracy(monkeypatch, capsys, tmp_path, encoder, splits, says):
    for probe in ('knn', 'finetune'):
        code,err = command(monkeypatch, capsys, encoder, '--data', photos(tmp_path/probe, **splits), '--probe', probe)
        assert code==1 and says in err, err

@pytest.mark.parametrize('n', [2, 3])
def test_few_images_a_class_work_with_every_examination(tmp_path, encoder, n):
    data = photos(tmp_path/'photos', train=dict(ant=n, bee=n, cat=n), test=dict(ant=1, bee=1, cat=1))
    for labels in (1., .5):
        found = mim_evaluate(str(encoder), str(data), 'knn,linear,lars,finetune', labels=labels, epochs=1, device='cpu', layer='all')
        assert list(found)==['knn','linear','lars','finetune'] and len(found['knn'])==2

def test_an_encoder_that_is_not_square(tmp_path):
    torch.manual_seed(0)
    save_encoder(create('mae', **SMALL | dict(img_size=(16,24))), tmp_path/'run/encoder')
    data = photos(tmp_path/'photos', train=dict(ant=4, bee=4), test=dict(ant=2, bee=2))
    found = mim_evaluate(str(tmp_path/'run'), str(data), 'knn,linear,lars,finetune', epochs=1, device='cpu')
    assert all(0<=v<=1 for v in found.values())

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
