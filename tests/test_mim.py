"What all methods share: images and masks that do not fit, and modules that only make targets"
import pytest, torch
from mim_nb.methods import create, methods
from mim_nb.tokenizers import DVAE

def ready(name, **kw):
    torch.manual_seed(0)
    m = create(name, **kw)
    if hasattr(m, 'set_tokenizer'): m.set_tokenizer(DVAE(vocab_size=m.head.out_features))
    return m.eval()

@pytest.mark.parametrize('name', methods)
def test_a_mask_for_other_images_is_refused(name):
    "Eight images and a mask of one row scored one image of eight"
    m,x = ready(name),torch.rand(8,1,28,28)
    mask = m.sample_mask(1).tensor
    if name=='mixmim': mask = mask[:48]
    for given in (mask, m.as_mask(mask) if name!='mixmim' else mask):
        with pytest.raises(ValueError, match='mask'): m(x, given)

@pytest.mark.parametrize('name', ['beit', 'mcbeit', 'mae', 'deepmim'])
def test_a_mask_that_hides_nothing_is_refused(name):
    with pytest.raises(ValueError, match='hides nothing'): ready(name)(torch.rand(2,1,28,28), torch.zeros(2,49,dtype=torch.bool))

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('images,message', [(torch.rand(2,1,28,28).double(), 'must be torch.float32'), (torch.zeros(2,1,28,28,dtype=torch.uint8), 'divide bytes by 255'),
    (torch.rand(2,28,28), 'images of shape'), (torch.rand(2,3,28,28), 'images of shape'), (torch.rand(0,1,28,28), 'images of shape')])
def test_images_that_do_not_fit(name, images, message):
    with pytest.raises(ValueError, match=message): ready(name)(images)

@pytest.mark.parametrize('name', methods)
def test_a_value_and_its_tensor_give_the_same(name):
    m,x = ready(name),torch.rand(4,1,28,28)
    mask = m.sample_mask(4)
    a,b = m(x, mask),m(x, mask.tensor.clone())
    assert torch.equal(a.loss, b.loss) and torch.equal(a.pred, b.pred) and torch.equal(a.mask, b.mask)

def test_a_tokenizer_is_no_part_of_what_is_saved():
    m = ready('beit')
    weights = {k: v.clone() for k,v in m.state_dict().items()}
    assert not any(k.startswith('tokenizer') for k in weights)
    bare = create('beit')
    bare.load_state_dict(weights)                                      # loads without one
    other = ready('beit', embed_dim=96)
    before = other.tokenizer.codebook.clone()
    other.load_state_dict(weights)                                     # and keeps the one it has
    assert torch.equal(other.tokenizer.codebook, before)
    old = weights | {f'tokenizer.{k}': v for k,v in DVAE(vocab_size=256).state_dict().items()}
    bare.load_state_dict(old)                                          # a file of 0.1 had it inside
    with pytest.raises(RuntimeError): bare.load_state_dict({k: v for k,v in weights.items() if k!='mask_token'})

def test_a_teacher_moves_with_its_student():
    encoder = create('mae').encoder
    encoder.pretrained_cfg = dict(input_size=(1,28,28), mean=(.286,), std=(.353,))
    student = create('deepmim', teacher=encoder)
    assert 'teacher' in dict(student.named_modules()) and not any(p.requires_grad for p in student.teacher.parameters())
    assert student.to('meta').teacher.mean.is_meta and not any(k.startswith('teacher') for k in student.state_dict())

def test_words_are_chosen_in_full_precision():
    "Under bf16 autocast one shipped word in twenty was another"
    m,x = ready('beit'),torch.rand(4,1,28,28)
    torch.nn.init.normal_(m.tokenizer.encoder[-1].weight, std=1e-4)       # choices that are close
    with torch.autocast('cpu', torch.bfloat16): out = m(x)
    assert torch.equal(out.target, m.tokenizer.ids(x))
    mc = ready('mcbeit')
    with torch.autocast('cpu', torch.bfloat16): assert mc(x).target.dtype==torch.float32

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('img_size,patch_size', [((32, 48), 4), ((32, 16), (4, 2)), ((24, 48), (2, 4))])
def test_images_and_patches_that_are_not_square(name, img_size, patch_size, tmp_path):
    "Training step, pictures, export and probes"
    from mim_nb.checkpoints import save_encoder
    from mim_nb.evaluate import features, load_encoder
    sizes = dict(embed_dim=48, num_heads=(2, 3), window=None) if name=='mixmim' else dict(embed_dim=48, depth=4, num_heads=2)
    m = create(name, img_size=img_size, patch_size=patch_size, **sizes)
    if hasattr(m, 'set_tokenizer'): m.set_tokenizer(DVAE(img_size, patch_size, vocab_size=m.head.out_features))
    x = torch.rand(2, 1, *img_size)
    m.train()(x).loss.backward()
    m.eval()
    assert m.reconstruct(x).shape==x.shape
    assert all(row.shape==x.shape for row in m.pictures(x, m.sample_mask(2)).values())
    save_encoder(m, tmp_path/'e')
    home = load_encoder(tmp_path/'e')
    torch.testing.assert_close(features(home, x), features(m, x), rtol=1e-4, atol=1e-4)
    assert features(home, torch.rand(3, 1, 28, 28)).shape[0]==3           # other sizes are resized to the encoder's own
