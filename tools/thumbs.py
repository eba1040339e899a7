"""The course as a map with pictures: on the built front page, each table between `<!-- map -->` marks becomes cards with thumbnails.

thumbs.py NOTEBOOKS SITE"""
import base64, io, json, re, sys
from html import escape
from pathlib import Path
from PIL import Image

SIZE = 200,120                                # pixels
CHOSEN = {'00b_augment': 4, '00c_shards': 1, '02_masks': 1, '02b_playground': ('02_masks', 4), '03_attention': 3, '04_encoders': 1, '05_mim': 2,
          '07_tokenizers': 4, '07b_authors_tokenizers': 2, '08_beit': 4, '09_mcbeit': 5, '10_mae': 3, '11_deepmim': 1, '13_mixmim': 1,
          '14_probes': 1, '14e_pictures': 3, '18_checkpoints': 2, '18b_convert': 1}     # which figure, from 0, where it is not the first; or another chapter's

STYLE = """<style>
ul.map { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.2rem 1rem; list-style: none; padding: 0 }
ul.map li { font-size: .85rem } ul.map li > span { display: block } ul.map a { text-decoration: none } ul.map strong { display: block; font-size: .95rem; text-decoration: underline }
ul.map :is(img, .nothumb) { display: block; width: 100%; height: auto; aspect-ratio: 5/3; object-fit: cover; border: 1px solid var(--bs-border-color); margin-bottom: .3rem }
ul.map .nothumb { display: grid; place-items: center; font: 1.6rem monospace; color: var(--bs-secondary-color) } ul.map .nothumb::after { content: '$ _' }
</style>"""

def page(nb): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(nb).stem)      # a notebook's name on the site: 08_beit.ipynb is beit

def figures(nb):
    "The PNG figures of a notebook, in order"
    cells = json.loads(Path(nb).read_text())['cells']
    return [''.join(o['data']['image/png']) for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]

def thumbnail(nb, to):
    "A small picture of one of a notebook's figures, its middle cut to shape; False if it has none"
    chosen = CHOSEN.get(nb.stem, 0)
    other,i = chosen if isinstance(chosen, tuple) else (nb.stem, chosen)
    found = figures(nb.with_stem(other))
    if not found: return False
    im = Image.open(io.BytesIO(base64.b64decode(found[min(i, len(found)-1)]))).convert('RGBA')
    w,h = im.size; scale = max(SIZE[0]/w, SIZE[1]/h)
    im = im.resize((max(SIZE[0], round(w*scale)), max(SIZE[1], round(h*scale))), Image.Resampling.LANCZOS)
    left = (im.width-SIZE[0])//2; im.crop((left, 0, left+SIZE[0], SIZE[1])).quantize(128).save(to, optimize=True)
    return True

def chapters(nbs):
    "`[(title, notebook, what one can do after it)]` for each table of the map in nbs/index.ipynb"
    text = '\n'.join(''.join(c['source']) for c in json.loads((nbs/'index.ipynb').read_text())['cells'] if c['cell_type']=='markdown')
    maps = re.findall(r'<!-- map -->(.*?)<!-- /map -->', text, re.S)
    return [re.findall(r'^\| \[(.+?)\]\((\S+?\.ipynb)\) \| (.+?) \|$', m, re.M) for m in maps]

def card(title, nb, line, nbs, site):
    to = site/'thumbs'/f'{page(nb)}.png'
    image = f'<img src="thumbs/{to.name}" width="{SIZE[0]}" height="{SIZE[1]}" loading="lazy" alt="A figure of this chapter">' if thumbnail(nbs/nb, to) else '<span class="nothumb"></span>'
    return f'<li><a href="{page(nb)}.html">{image}<strong>{escape(title)}</strong></a><span>{escape(line)}</span></li>'

def put_map(nbs, site):
    "Write the thumbnails, and put the cards in the place of the tables of the built front page; how many there are"
    nbs,site = Path(nbs),Path(site); (site/'thumbs').mkdir(exist_ok=True)
    tables = ['<ul class="map">' + ''.join(card(*c, nbs, site) for c in t) + '</ul>' for t in chapters(nbs)]
    index = site/'index.html'; html = index.read_text(); left = iter([STYLE+tables[0], *tables[1:]])
    html,n = re.subn(r'<!-- map -->.*?<!-- /map -->', lambda m: next(left), html, flags=re.S)
    if n!=len(tables): raise ValueError(f'the built front page has {n} maps and the notebook {len(tables)}: the marks <!-- map --> and <!-- /map --> were lost on the way')
    index.write_text(html)
    return sum(t.count('<li>') for t in tables)

if __name__=='__main__':
    if len(sys.argv)!=3: sys.exit(__doc__)
    print(put_map(*sys.argv[1:]), 'chapters on the map')
