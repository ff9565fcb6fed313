"""The icon sets of the source `icons`: pinned npm packages, by whom they are drawn, and under which licences.

Taken are the sets that Iconify lists in its categories of plain icons under MIT, ISC, Apache-2.0, CC BY, OFL, CC0 and the
Unlicense. Left out are share-alike, copyleft and non-commercial sets, sets of logos, flags, emoji and files of programming
languages, and sets that Iconify has withdrawn or that are animated.
"""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """A pinned npm package."""

    version: str
    sha256: str  # of its archive


class IconSet(NamedTuple):
    """A set: the npm package `@iconify-json/NAME`."""

    family: str  # sets of one team, or drawn after another one's: together they count as one that draws an object
    licence: str  # as SPDX names it; the package must say the same
    package: Package


class TagPackage(NamedTuple):
    """A package with tags, by the authors of some sets."""

    sets: tuple[str, ...]
    licence: str
    package: Package


def _sets(table: str) -> dict[str, IconSet]:
    rows = (line.split() for line in table.strip().splitlines())
    return {name: IconSet(family, licence, Package(version, sha256)) for name, version, family, licence, sha256 in rows}


# set, version, family, licence, sha256 of the package's archive
ICON_SETS = _sets("""
akar-icons                1.2.7    akar-icons       MIT        21d871932fc182074cd206b88d6b40cbeffa45d17fdf800fc3bc81358e8ff8c0
ant-design                1.2.9    ant-design       MIT        d6351e677f9e51b7a15cf0702a0c151e5c663ec8a053ebf2aa79743ddf0438e2
basil                     1.2.4    basil            CC-BY-4.0  152e336919ca6c9f8beede2e99687fa264ef4c292e359b091999e801ca9bc0ad
bi                        1.2.7    bi               MIT        86a7f213711c929169dbcd64318cd678a0845385156fc707401ba07cbde4da0d
boxicons                  1.2.0    boxicons         MIT        4bcff3c121aad4eea8370652ca913994043bfbd0985bcf2cd3545c631bf3d67f
bx                        1.2.3    boxicons         MIT        1628cd7f4c2b787e2162181ea1b6fe012ebf6f02c0aeaa48b5cc197fbc6ee9ec
bxs                       1.2.3    boxicons         MIT        8e72330ae8aaca7368b9bf81d345bcf0a0ec4d72e18c9fa1e70d0867aab2e03a
bytesize                  1.2.2    bytesize         MIT        91a8cdc677bd1dbedfc8b27b2f6bfbea04b8bf917e34f9d2fefe3380031958d2
carbon                    1.2.29   carbon           Apache-2.0 8e3059dc90933875439c29ff36ae4370767bc02d8beca6923b1f2bb856cf327a
charm                     1.2.3    charm            MIT        4f33aa5c39c17fae420b96777d168acda138ffba9d966552e78955a8a33fffcb
ci                        1.2.2    ci               CC-BY-4.0  cf98f841a81cc771b869ab1faa28a734e28b37354ed720dcac7fd96d21701805
cil                       1.2.3    cil              CC-BY-4.0  4b15665dd0b5fc53981b99f54d3cdbb27afe50f54c41e734458b3c49788a34a9
clarity                   1.2.4    clarity          MIT        6ea2d256f5fc8b4a1778d332533fab81daf4197d3809e2ac8df82ab54fd02f26
codicon                   1.2.74   codicon          CC-BY-4.0  ab3949a40cf8d0e39b634303003d54422cdcc798afbb3cac864141d127dd6888
cuida                     1.2.5    cuida            Apache-2.0 8cdcd91208310a9fa9ac6d8e2d3fe54790241733b5793ee9585ed9dd23095eba
duo-icons                 1.2.2    duo-icons        MIT        aa69efff27e1bfeecc434cc0ba58d15e443cdebb3e7a65a89d815867f62a8ca0
ei                        1.2.2    ei               MIT        7d767c87c653e5544be67867fd8a6be4127164080bc5d30270b610638707d7b5
el                        1.2.2    el               OFL-1.1    82f723275ced8ef5b31c06d037705043aaf36b80f8907838bdaa7d5e43e2a38c
eos-icons                 1.2.4    eos-icons        MIT        6e054b7ad2b4c81b02deb1e66e2c242a9264114cc6690da0e6e57a398cf80760
ep                        1.2.4    ep               MIT        4b41401a5f751e46e3fceefb54c7a8ff6721d50f7beb5b0c97cb3edd5c5ce23f
eva                       1.2.3    eva              MIT        728a5f3f5ea238be5ce65ef3306042d188b9eda52d652f8108ab205264696a97
f7                        1.2.2    f7               MIT        faf920e62acd7dfafb2ba752ae5b9d6cb089483bcd006ebad9efaab96b27835c
fa                        1.2.2    fontawesome      OFL-1.1    907daf8e4a0c31ff5121fdad8bf7a3e1e03fd2afa79b6dd3005d7f7d7f1a199b
fa-regular                1.2.2    fontawesome      CC-BY-4.0  72763fb6a0aaf88147e403490ea89383bf7f180bfad66bac3b1e54dae67574b7
fa-solid                  1.2.2    fontawesome      CC-BY-4.0  0be98f3a6671238ccf12cdbe2f4f38d9dfc346c770d625015dc35b6683c42208
fa6-regular               1.2.4    fontawesome      CC-BY-4.0  22aa8aff1614036a9f355b11bb7b2d81a309a4faf1586d6d5a360eaecf1222cc
fa6-solid                 1.2.4    fontawesome      CC-BY-4.0  082c792eaad4751626438773fa7360cb23f495b687cf2dd01b2b0fccc7f6af8b
fa7-regular               1.2.3    fontawesome      CC-BY-4.0  56d259c56885bc2238251aa75aa42a0da568da5ab01265fea8b37f6b225f2d4b
fa7-solid                 1.2.5    fontawesome      CC-BY-4.0  2a5c09e0094306e42c357d5b9da1feb39b46cd16d5df6f3d1a89f3093e074d91
fad                       1.2.1    fad              CC-BY-4.0  c134ecc14f3765679ba6d4112d30e7b6d0e5c6e490fa1d7f4abe1da87054bd47
famicons                  1.2.2    ion              MIT        41d4087c1047a454d1eff70dec4d787bf05061e787427925ce691589b511f278
fe                        1.2.4    fe               MIT        f2594e86fc3d48c3429fd0c1e357944edb3ab63361336cb1ca57f56f24c6dc22
flat-color-icons          1.2.3    flat-color-icons MIT        d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786
flowbite                  1.2.7    flowbite         MIT        dff96194210b9f62a1270a991de8f1c4030887ea9d6df90b25dc0365f0f87c88
fluent                    1.2.60   fluent           MIT        9a7cad7adb15288c1fd5e2e1835f1b17f2a8764bb1f31971bffa7c9df1349d6d
fluent-color              1.2.21   fluent           MIT        fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe
fluent-mdl2               1.2.1    fluent           MIT        5c9f2e0d839bb02d5f70f5dcb95e93080d12c33aadfceaffc24a1362a33ce08a
fontisto                  1.2.1    fontisto         MIT        42e7922ebf43cbd11e710c453b4431c6bbfd46c9c1bad98c6e7fcfde7791abbc
formkit                   1.2.2    formkit          MIT        da20af6479aade027a36def45f54775abdaa2cd4cd21a831a6203560831ee659
foundation                1.2.1    foundation       MIT        6e69425bb92d0baab104c531df35248a7f49322a8f0697ba9c93689c8cd6ecf6
game-icons                1.2.4    game-icons       CC-BY-3.0  f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4
garden                    1.2.6    garden           Apache-2.0 6371f1a870ab9cef15b6ffc9553803afbde9f8b0c30f877adcf60dc651ff0a10
gg                        1.2.2    gg               MIT        ee7a061fb05fdadcc7fdcf7b11d6d4aec427a8695f92efd909a0af242028eb44
gis                       1.2.5    gis              CC-BY-4.0  eb2d15491b8252b5da4becb568b6b0a380399b2325e1d1108cd82a034d639a70
gravity-ui                1.2.15   gravity-ui       MIT        ba0de35b896aa87b0d702acb0c34113053d7cc65cd4e5c50bf44ec2d39f01843
griddy-icons              1.2.0    griddy-icons     MIT        4c36a13ecc3e0950860c4d78e8a44f45630ac4bdfbf55f120f6e46f4acacce00
grommet-icons             1.2.4    grommet-icons    Apache-2.0 5c9d2ed38982bbd9e1a8ee5bbbc82dd8f574bf1530d1014813a2b298e07a8d80
guidance                  1.2.2    guidance         CC-BY-4.0  87a0b6a5791954a33c8694bfdb2635d38d1226bfbd3f58f853e036b365bd30fb
healthicons               1.2.13   healthicons      MIT        4c2552c45737788a6599da3c5b72610c7fb4e7f87075d401c56fa16d487d4caf
heroicons                 1.2.3    heroicons        MIT        5d9e7a61b36fb8f2444727807aca55bf613924bbb7d47fea408b7a9ea90ce2fb
heroicons-outline         1.2.1    heroicons        MIT        9e50f519e583ddbdd2f2f07c0728f87281d002ef40e860031c2777eb774f1228
heroicons-solid           1.2.1    heroicons        MIT        03237ccebdf8cc14263a5ac3bbff6b5356d981e4a5c286543756f33a0ea68867
hugeicons                 1.2.35   hugeicons        MIT        cca09de913319938961fa0613a8eb42952f76c3ee13a7c68ef411091590c5d8b
humbleicons               1.2.20   humbleicons      MIT        f1221ddb636a8192726868809a82c917beb96ef04b10397439c8cfb6ecfc676d
ic                        1.2.4    material         Apache-2.0 48150a6da112bf59e616c21f98060117ffb1029bd1e54c1cc35d278f1d444025
icon-park                 1.2.4    icon-park        Apache-2.0 c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f
icon-park-outline         1.2.4    icon-park        Apache-2.0 e4c29776086e46ed7d113b7d44798a36ca74df6dcfb949da142db34714ab7c8a
icon-park-solid           1.2.4    icon-park        Apache-2.0 3af17a63c120891842d272ec34b4bec414e6c4801af8158a460b4c3cb4dc1248
icon-park-twotone         1.2.4    icon-park        Apache-2.0 579560dd7c0e1c6f53297129f3a32cdcf4292871e2c5e82e502840c7ce68eabb
iconamoon                 1.2.2    iconamoon        CC-BY-4.0  2443df51c8de6c49c770a0982791d1b5a45dbf82e1216c50dc7084a5b5af737b
iconoir                   1.2.11   iconoir          MIT        8e5d3bfbd55aa8ef3878f0c2f248cf71fe99822172fd07990e32ab7fe7a68b1e
icons8                    1.2.1    icons8           MIT        3c425ed4b57c9eb5017f73f70f158fc892c6c5fabd8b53a522a1b2433aec45f7
ion                       1.2.7    ion              MIT        4103445dba712aa0f6d119706df00b2e821634f9ca96faac5ddbfb3bad65927f
ix                        1.2.12   ix               MIT        6604d7c96d7d4a7963d186ae6b088852b3d2064a2581561b21a14195dcb4a8de
jam                       1.2.3    jam              MIT        fb174e7358cca8e070ad5ca7a8462713f1cd7b45e894a18e13dcefddeeb04022
la                        1.2.1    fontawesome      Apache-2.0 c35ad2a463fc30d3153a36dd614d4007a4f0ee7ea93705e035e1687d516d48c4
lets-icons                1.2.2    lets-icons       CC-BY-4.0  560d8f94ef1eebf2747a167d36e81523307b8262e267f1e495817f482e1a7480
lineicons                 1.2.6    lineicons        MIT        96677311fcdd11291dde4d79f1abbd4a2fcfc2509f63e37f960728c27b8e1a25
lsicon                    1.2.5    lsicon           MIT        47ef4e1f90bf931d5b35eb287144883f036434b22757447417a1e831677e2c26
lucide                    1.2.137  lucide           ISC        e74db8c3a55fff55bc82de21268c4bced9f65ff10aacc0d5f3a395b0e93243c3
lucide-lab                1.2.3    lucide           ISC        ea0a3dc587d60e65b4e710f2239a54a6609fcd19b214f9eb0df66874f920df08
mage                      1.2.4    mage             Apache-2.0 fc44d6d9eb52de8e344a799783b34936d1b78ae5bf66a4b06a91ee736b5a7e60
majesticons               1.2.5    majesticons      MIT        c5f3b1fe9c4051d4c5459a45ebe1d77cd0725c4324fde0897c8ea453075dbcf1
maki                      1.2.5    maki             CC0-1.0    cbf41d1b7262fad2eecdc6425ae5afed2de9b3512093c4c778fb456e788d7e12
map                       1.2.2    map              OFL-1.1    8d6966f60f3826cf95e601e6adb55b943f7c76b518b5920aa5e2a1e5d7daea9d
marketeq                  1.2.2    marketeq         MIT        80070c7b0fb41ed5198ecadb9145984d2221b975bb9e0f52f563beb241d549cb
material-symbols          1.2.98   material         Apache-2.0 142d50bf28e7db85362795be335ebc29dac611d73c404fc1e6fc5cc198e2b3d0
material-symbols-light    1.2.94   material         Apache-2.0 b720dad80acabc2ab4312a67d31da70fc6e59a539aeb799b364f4dcb76800e7e
mdi                       1.2.3    mdi              Apache-2.0 ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac
mdi-light                 1.2.2    mdi              OFL-1.1    78fde582d4b9baaf413689469425c4e5f50d9226d884c5eac947fb6c0d00fa87
meteor-icons              1.2.8    meteor-icons     MIT        15ce95073a565ea47c4d174e2ab86d717a6efbb8a187ef05ecd3876b98ef00e8
mi                        1.2.2    mi               MIT        e2a78d01ec0d049248f4084378253629c034d2f91b6b4570a6e124ef1653b279
mingcute                  1.2.8    mingcute         Apache-2.0 fec65f4430ac70a968e0e7fc7741e7064ba91e6da992b905f75c9d70c717bd2c
mynaui                    1.2.19   mynaui           MIT        ed3fbfc8e945b6dd918ff6648c79b366f81f95c72dc95449a51040f9029521c2
nimbus                    1.2.1    nimbus           MIT        63e69154de5122b424f04e1840cab12f36a1f7559de1e4f84f2c0c67ef3eab8f
nrk                       1.2.11   nrk              CC-BY-4.0  e6509a8a64d50471cdaa999734faaadcdf66d20dafe73bc24dddd636530fe54b
octicon                   1.2.36   octicon          MIT        dc4228eb904ed1d16f7b00de3148bc9f3a5c70fad201e64dd1c01d68a82351d5
oi                        1.2.0    oi               MIT        ed000f0b4c5ae1099e7f698265595bfbe3f2959eea07a524cbfed62d11c60dcf
ooui                      1.2.24   ooui             MIT        4665277ef58ab8038971e5c8920276eeeb6f59ecc9a060472271f9d718dd5d6f
oui                       1.2.6    oui              Apache-2.0 c2176ceb33ff1b8b73f803b296abc95a52a9808aee977f218dc71d49e5c91aaa
pajamas                   1.2.15   pajamas          MIT        dd4990ba9303520dc3ec02fe95f32acb9689d8398b8dbfc20371b2a9c7ab3d92
pepicons-pencil           1.2.4    pepicons         CC-BY-4.0  aa0c39ba71c42c0d6f3d8b97a47a54b0c1459ebbbe536b81d830adb8bddfbcd5
pepicons-pop              1.2.4    pepicons         CC-BY-4.0  a65d9619c50f38880b6ec4153eaaf8dbf825009680a8946dbe859740c98c5dad
pepicons-print            1.2.2    pepicons         CC-BY-4.0  2dcdd5721c0ff94b73766561a02be16f42c84edd563fffe4cd4150b3d7125222
ph                        1.2.2    ph               MIT        e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc
picon                     1.2.0    picon            OFL-1.1    4515758186f903f8d4dad00e61af72e9bac0024e2c68bb80a53f278b96a6ec84
pinhead                   1.2.28   pinhead          CC0-1.0    bc672ec8dc614ae0a8e64a1dc9674f3e8fb2f090b22c30beeb35bcb7ec0ea74a
pixel                     1.2.2    pixel            CC-BY-4.0  6a6c2b81d196d86d28bf9f778f7569ea6a3f3bd78ab48750349c94582c331487
pixelarticons             1.2.9    pixelarticons    MIT        f3e7c9b8ae9fb75f214207d5657e7a75084f9f368ea9d6cbfb211fa96d8978fb
prime                     1.2.5    prime            MIT        d1d2f1e4adf1bbd03073be68232fce0a98258f911ebe9f11716bf0f062a4979e
proicons                  1.2.20   proicons         MIT        951dc0fd780704fd098deadc4c880d31392619d4f0c2ec49b3758a856f2dab2e
qlementine-icons          1.2.16   qlementine-icons MIT        3a35f7fd8600a2b0d9e85a541bd85aa498bfa2e761ae17cfff612d44f366b44c
quill                     1.2.4    quill            MIT        4194112f3be76145a15be8919b24bb1e7fc2b0e62082e82fab07f367be2569fa
radix-icons               1.2.6    radix-icons      MIT        96af74dd8a61686a4d2c27772d7eecdcab155bd3904722ebfc9c46ca6dcaa00f
raphael                   1.2.1    raphael          MIT        19ca67236049fe19b882102f5a9f31054789e39f71982e67b4b489a86baef52f
ri                        1.2.10   ri               Apache-2.0 f7ab45281b250fb0bfa5c5438fc334f010cbf695f5ac851b90b296ef4674fb07
si                        1.2.17   si               MIT        afa062a24572cd4a5324cbe16ded7e41ceec7f68d280ea2d79b6a54a8a5106de
simple-line-icons         1.2.1    simple-line-icons MIT        92fd6ea62735a99dec4be69acf5b2c5de61ba54a4442a978a91d3d4201bf1900
solar                     1.2.13   solar            CC-BY-4.0  9efec9045e9188c5dd5cf9de52f8ad968ffabee565026480a6c74bfe63b3bbc2
stash                     1.2.4    stash            MIT        42d3064c017c68e9e1207ebf52a2cf0d4e19a5b2abc65d9c70af1bb9a2959623
streamline                1.2.5    streamline       CC-BY-4.0  b64ca35d4d9fb1f6e730d260ab59e1ded79b23d9f156f8d2f458df6a7aa4cf53
streamline-color          1.2.2    streamline       CC-BY-4.0  06c2addb59f572b2bfe581863888fcf7dbe0927e0511e7157c54f332fe90347f
streamline-cyber          1.2.2    streamline       CC-BY-4.0  d094a126fe46c3868c46a90515ec9251a45009a95dd008d6f73b02fe8f47bdce
streamline-cyber-color    1.2.2    streamline       CC-BY-4.0  bc71bb624b8a500841e2e47c0175bf13dfb99b38a6ddc2421d3ac21331e21eac
streamline-flex           1.2.3    streamline       CC-BY-4.0  ac9e29b9d1ad1b483fbf5ad1923c9a0aa49378fd72badaa2e849ab20d7e8f0fd
streamline-flex-color     1.2.2    streamline       CC-BY-4.0  17ef2e9d596bb288991c271a2b468be822f994cb073c94801a1c186a0e4af827
streamline-freehand       1.2.1    streamline       CC-BY-4.0  82aaac29eea268746717e37ea498f3a31bc7df97cf3faf4e0852e9f9bfac0bdf
streamline-freehand-color 1.2.2    streamline       CC-BY-4.0  00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642
streamline-kameleon-color 1.2.2    streamline       CC-BY-4.0  5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b
streamline-plump          1.2.0    streamline       CC-BY-4.0  e158c4e47a0fd030b028c511b6eebb27ee4fad68710e47670b0099604fd5077c
streamline-plump-color    1.2.2    streamline       CC-BY-4.0  33ed8a9ebda9ed896125f1e01873105688d68d0b0c95ca1bcead5a41309afcf6
streamline-sharp          1.2.0    streamline       CC-BY-4.0  88e83ec263d6537dca0fa4814201598837dc7519e420f335eea104c6db0110e2
streamline-sharp-color    1.2.2    streamline       CC-BY-4.0  2bf3019009ba033d723823dc16ff3c7f5a7dbce25e31860ed9d4b1060a1f5831
streamline-stickies-color 1.2.2    streamline       CC-BY-4.0  e96b8b2bbe1efde22272c420a75024b4b2c7e224ec1f323c93a421a07410971e
streamline-ultimate       1.2.2    streamline       CC-BY-4.0  e09225d443837eddfed5ba6c4d5bd454aa7167a914ea6c45db270fd4eecc7c0f
streamline-ultimate-color 1.2.2    streamline       CC-BY-4.0  46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6
subway                    1.2.0    subway           CC-BY-4.0  ac388b0d1df6184801ef49afaac818e6cab525f1ca9812aa4a217a448066d48a
system-uicons             1.2.4    system-uicons    Unlicense  4cb72e98269e4c0fbb60399f9c3da643c093113f6e5c641fa724437e47b72239
tabler                    1.2.41   tabler           MIT        3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6
tdesign                   1.2.19   tdesign          MIT        af53c40f637023517d6a65f609c844d74ad33362b221de971e9579e252a3b8cb
teenyicons                1.2.2    teenyicons       MIT        d7433dcfad7bfe26ccab3482516050f8f2d9ea4aacf1d2cb0230694198adda2d
temaki                    1.2.6    temaki           CC0-1.0    24a874e1d81a7de9d56e534fdc56287cfe6e73488a24ef5c8982d4fd5f294d8d
uil                       1.2.3    unicons          Apache-2.0 8c6c7e7943243ab1254111b175089ec9a8f414f3b4a005883739de015b7ab890
uim                       1.2.3    unicons          Apache-2.0 75585981adca142c4833d50376d1272b09469d82dc04e850dbf65506d1b3a04c
uis                       1.2.3    unicons          Apache-2.0 114b32a7582764d82032b32df4cdbeca768a421008806abfdfd9ebc9794b82f8
uit                       1.2.3    unicons          Apache-2.0 6e6a0d54573fd9e8900b6a346c767f27d3e097df25840507659298233cfcf758
uiw                       1.2.4    uiw              MIT        39f47a7c705d9fd03f21ca32e6d3cf74f18a10c8b6945c1d20016afc7161653d
vaadin                    1.2.1    vaadin           Apache-2.0 e60ee2ff629c9d9950101371b995536b921661f668d65f058f0ee56c5e125696
weui                      1.2.4    weui             MIT        59e23f6960f1a8f806d6c08e2c16257abe796eb77ba6b086075e70e1084763af
wpf                       1.2.0    wpf              MIT        ed1d234605a17ab538ea4cbe936a0d7ca10cbbfb007cf1f3e37bb541783b0dbc
zondicons                 1.2.2    zondicons        MIT        bf1688f0cc50f8ef21f0178ef7e1fcc2df5f9faab98d96018686d326964a7b91
""")

# package of a set's own authors -> that package, and the sets whose icons it has tags for
TAGS = {
    "@carbon/icons": TagPackage(
        ("carbon",),
        "Apache-2.0",
        Package("11.89.0", "0700c375e42de275bd3f25e4d19966fa03f37d53b1e9f92055cb94b6ee4dd0b7"),
    ),
    "@vscode/codicons": TagPackage(
        ("codicon",),
        "CC-BY-4.0",
        Package("0.0.45", "dd7c6b20535753027c399dcaea4d12a0e6aaf73de10a3a8f4abfc51d13a88362"),
    ),
    "@fortawesome/fontawesome-free": TagPackage(
        ("fa7-solid", "fa7-regular"),
        "CC-BY-4.0",
        Package("7.3.1", "ca4e32843bd81711894385c2466fb19c55cfd32ef3c58830b2d1df7bd42e6571"),
    ),
    "@gravity-ui/icons": TagPackage(
        ("gravity-ui",),
        "MIT",
        Package("2.23.0", "693ee352b578cbd7686563d1ec43bdd093ba5d7becc29fd10ecc15a0adfc9f42"),
    ),
    "ionicons": TagPackage(
        ("ion",),
        "MIT",
        Package("8.1.0", "6ec604a301f9bb1a59ccc72a746cbb369bae87c5b45f6c67904dc878d9efb8b5"),
    ),
    "lucide-static": TagPackage(
        ("lucide",),
        "ISC",
        Package("1.62.0", "386f9080c440d6f5049cefe3456ae8357f7a0c7f76e59670cd1cb83bc7050a44"),
    ),
    "@mdi/svg": TagPackage(
        ("mdi",),
        "Apache-2.0",
        Package("7.4.47", "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef"),
    ),
    "@primer/octicons": TagPackage(
        ("octicon",),
        "MIT",
        Package("19.42.0", "8ae65252de0d8b24e068362c375533ef9a00fdf04e99f23d80df680d34138237"),
    ),
    "@phosphor-icons/core": TagPackage(
        ("ph",),
        "MIT",
        Package("2.1.1", "313332be6190b724da24107addd781799b48bf76b13963f24501112ffe1baadd"),
    ),
    "@tabler/icons": TagPackage(
        ("tabler",),
        "MIT",
        Package("3.52.0", "626620c7d42afd2f294fba167ce4653b5cb946336d186b4991c70b700e5616af"),
    ),
}
